"""`xdit-ir check`: does every rank compute what the model computes? One row per set of degrees."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

import xdit_ir as xir
from xdit_ir import degrees
from xdit_ir.api import TracedProgram
from xdit_ir.checking.check import check_parallel
from xdit_ir.checking.limits import Limits
from xdit_ir.errors import XditError
from xdit_ir.passes.trim_padding import rows_to_trim
from xdit_ir.tools import targets
from xdit_ir.tools.check_report import Row, github_commands, junit
from xdit_ir.tools.terminal import progress_bar, working, write

EQUAL, DIFFERENT, REFUSED = 0, 1, 2


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="prove that the parallel programs compute what the model computes",
        description="Run every rank of every set of degrees in this process and compare with the model. "
        "Exit status: 0 all equal, 1 some differ or cost more than they may, 2 wrong usage or refused degrees.",
    )
    parser.add_argument("model", metavar="MODEL", help=targets.HELP)
    parser.add_argument(
        "--degrees", default="u2,r2,u2r2", metavar="LIST", help="such as u2,r3,c2u2,p2 (default: %(default)s)"
    )
    parser.add_argument("--trim-padding", type=int, metavar="N", help=targets.TRIM)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative error (default: %(default)s)")
    parser.add_argument(
        "--max-share", type=float, metavar="PART", help="fail where the slowest rank does more of the FLOPs than this"
    )
    parser.add_argument(
        "--max-fallbacks", type=int, metavar="N", help="fail where something is gathered for more operators than this"
    )
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write a test report for a CI server")
    parser.add_argument("--github", action="store_true", help="also print annotations for GitHub Actions")
    parser.add_argument("--device", help="where to run (default: cpu)")
    parser.add_argument("--force", action="store_true", help="allow a full-size model of the zoo on the CPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check all sets of degrees, print the table and what failed."""
    wanted, limits = degrees.parse(args.degrees), Limits(args.max_share, args.max_fallbacks)
    target = _load(args)
    with working(f"tracing {args.model}"):
        traced = xir.trace(target.model, target.example)
    if args.trim_padding is not None:
        traced = traced.trimmed(rows_to_trim(args.trim_padding))
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("checking", total=len(wanted))
        for one in wanted:
            progress.update(task, description=f"checking {one}")
            rows.append(_check(one, traced, target, args.tolerance, limits))
            progress.advance(task)
    _print(rows, args)
    _for_machines(rows, args)
    verdicts = {row.verdict for row in rows}
    if verdicts & {"DIFFERENT", "COSTLY"}:
        return DIFFERENT
    return EQUAL if verdicts == {"equal"} else REFUSED


def _for_machines(rows: list[Row], args: argparse.Namespace) -> None:
    if args.github:
        for line in github_commands(args.model, rows):
            print(line)
    if args.junit is not None:
        try:
            args.junit.write_text(junit(args.model, rows))
        except OSError as error:
            raise XditError(f"cannot write {args.junit}: {error.strerror}") from error


def _load(args: argparse.Namespace) -> targets.Target:
    if targets.is_full_size(args.model) and not args.force and args.device is None:
        raise XditError(
            f"{args.model} in full size needs memory for all its weights; check {args.model}:tiny, which has "
            "the same kinds of layers (or name a --device, or give --force)"
        )
    device = args.device or "cpu"
    with working(f"loading {args.model}"):
        target = targets.resolve(args.model, device=device)
        if any(tensor.is_meta for tensor in target.tensors()):
            raise XditError(f"{args.model} has tensors on the meta device; check needs real weights and inputs")
        return target.to(device)


def _check(
    one: degrees.Degrees, traced: TracedProgram, target: targets.Target, tolerance: float, limits: Limits
) -> Row:
    start = time.monotonic()
    try:
        parallel = traced.parallelize(**one.as_dict())
        result = check_parallel(parallel, target.model, target.example, tolerance=tolerance)
    except XditError as error:
        return Row(one, error=error, seconds=time.monotonic() - start)
    report = parallel.report()
    return Row(one, result, report, limits.exceeded(report), seconds=time.monotonic() - start)


COLOURS = {
    "equal": "green",
    "DIFFERENT": "bold red",
    "COSTLY": "bold red",
    "refused": "yellow",
    "ERROR": "bold red",
}


def _print(rows: list[Row], args: argparse.Namespace) -> None:
    table = Table(title=f"{args.model}: every rank against the model, tolerance {args.tolerance:.0e}")
    table.add_column("degrees")
    for name in ("ranks", "max relative error", "slowest rank's FLOPs", "fallbacks", "MiB sent"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in rows:
        table.add_row(*_cells(row))
    write(table)
    for row in rows:
        if row.verdict in ("DIFFERENT", "COSTLY"):
            print(f"{row.degrees}: {row.explanation}")
        elif row.error is not None:
            print(f"xdit-ir: {row.degrees}: {row.error}", file=sys.stderr)
    equal = [row.result for row in rows if row.verdict == "equal" and row.result is not None]
    for note in dict.fromkeys(note for result in equal for note in result.notes):
        print(f"note: {note}")


def _cells(row: Row) -> list[str]:
    """The row's text."""
    verdict = f"[{COLOURS[row.verdict]}]{row.verdict}[/]"
    if row.result is None or row.report is None:
        return [str(row.degrees), str(row.degrees.ranks), "-", "-", "-", "-", verdict]
    report, error = row.report, f"{row.result.max_relative_error:.1e}"
    sent = f"{sum(entry.bytes_per_rank for entry in report.collectives) / 2**20:.3f}"
    ranks, fallbacks = str(row.result.world_size), str(len(report.fallbacks))
    return [str(row.degrees), ranks, error, f"{report.share:.4f}", fallbacks, sent, verdict]

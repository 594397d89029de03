"""`xdit-ir inspect`: a model's program, before and after it is divided over ranks, and what that costs."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import xdit_ir as xir
from xdit_ir.api import TracedProgram
from xdit_ir.errors import XditError
from xdit_ir.inspection import WRITERS, inspect
from xdit_ir.inspection.collect import lower_rank
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.ir.printer import body_text, program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.order import analysis_passes
from xdit_ir.passes.trim_padding import rows_to_trim
from xdit_ir.planning.hardware import parse as machine
from xdit_ir.sharding.machine import H100
from xdit_ir.text import save
from xdit_ir.tools import targets
from xdit_ir.tools.terminal import working, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Render = Callable[[Program], str]
DRAWINGS = {
    "html": "a page that needs nothing else: the blocks, every value, what passes changed, the schedule",
    "svg": "a drawing of the blocks",
    "dot": "the same for Graphviz",
    "json": "all of it as data",
    "trace": "the schedule for Perfetto or Chrome's trace viewer",
}


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="print a model's program, and what parallel degrees make of it",
        description="Print a model's program; with a degree, also the program of the ranks, and a report. "
        "Needs no GPU, and for the zoo no memory for weights.",
    )
    parser.add_argument("model", metavar="MODEL", help=targets.HELP)
    for name in MESH_DIMS:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"ranks along {name} (default 1)")
    parser.add_argument("--trim-padding", type=int, metavar="N", help=targets.TRIM)
    parser.add_argument("--machine", type=machine, metavar="M", help=targets.MACHINE)
    parser.add_argument("--bodies", action="store_true", help="print every operator, not only the block level")
    parser.add_argument("--block", metavar="NAME", help="print only this block, with every operator")
    parser.add_argument("--passes", action="store_true", help="print the program after each pass")
    parser.add_argument(
        "--gpu",
        type=_capability,
        default=(9, 0),
        metavar="M.N",
        help="with --passes: the compute capability of the GPU that rank 0 is shown for, or `none` (default: 9.0)",
    )
    parser.add_argument("--report", action="store_true", help="print only the report")
    parser.add_argument("--output", "--text", type=Path, metavar="FILE", help="write the text to FILE instead")
    for name, what in DRAWINGS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"instead, write {what}")
    parser.add_argument("--ir", type=Path, metavar="FILE", help="instead, write the traced program for `xdit-ir opt`")
    parser.add_argument("--device", default="meta", help="where a zoo model is made (default: meta, no memory)")
    parser.add_argument("--dtype", choices=DTYPES, help="of a zoo model (default: bfloat16, for :tiny float32)")
    parser.set_defaults(run=run)


def _capability(text: str) -> tuple[int, int] | None:
    if text == "none":
        return None
    if (found := re.fullmatch(r"(\d+)\.(\d+)", text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability: expected one such as 9.0, or none")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    """Print, or write to a file; nothing is printed if a degree is illegal."""
    given = {name: getattr(args, name) for name in MESH_DIMS if getattr(args, name) is not None}
    Mesh.of(**given)
    traced = _trace(args)
    if args.ir is not None:
        print(f"wrote {' and '.join(map(str, save(traced.ir, args.ir)))}")
    drawn = _draw(args, traced, given)
    if (args.ir is not None or drawn) and args.output is None:
        return 0
    sections = _sections(args, traced, given)
    if args.output is None:
        for section in sections:
            write_text(section)
        return 0
    text = "\n".join(sections) + "\n"
    _write(args.output, text)
    print(f"wrote {len(text.splitlines())} lines to {args.output}")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise XditError(f"cannot write {path}: {error.strerror}") from None


def _draw(args: argparse.Namespace, traced: TracedProgram, given: dict[str, Any]) -> bool:
    """Write the pages and drawings that were asked for; whether there were any."""
    wanted = {name: getattr(args, name) for name in DRAWINGS if getattr(args, name) is not None}
    if wanted:
        with working("gathering what each pass changed"):
            inspection = inspect(traced, args.model, args.machine or H100, **given)
    for name, path in wanted.items():
        text = WRITERS[name](inspection)
        _write(path, text)
        print(f"wrote {path} ({len(text) / 1e3:.0f} kB)")
    return bool(wanted)


def _sections(args: argparse.Namespace, traced: TracedProgram, given: dict[str, Any]) -> list[str]:
    view = _view(args, traced.ir)
    before = [f"# {args.model}\n{view(traced.ir)}"]
    if args.passes:
        before += _analysis(traced, view)
    if not given and not args.report:
        return before
    named = " ".join(f"{name}={size}" for name, size in given.items()) or "one rank"
    steps: list[str] = []
    with working(f"parallelizing: {named}"):

        def note(one: Pass, program: Program) -> None:
            steps.append(_after(one, program, view))

        parallel = traced.parallelize(**given, machine=args.machine.prices if args.machine else H100, after=note)
        if args.passes:
            lower_rank(parallel, 0, args.gpu, note)
        report = f"# report: {args.model}, {named}\n{str(parallel.report()).rstrip()}"
    if args.report:
        return [report]
    after = steps if args.passes else [f"# {args.model}, {named}\n{view(parallel.ir)}"]
    return [*before, *after, report]


def _trace(args: argparse.Namespace) -> TracedProgram:
    dtype = DTYPES.get(args.dtype, torch.bfloat16 if targets.is_full_size(args.model) else None)
    with working(f"tracing {args.model}"):
        target = targets.resolve(args.model, device=args.device, dtype=dtype)
        traced = xir.trace(target.model, target.example)
    return traced if args.trim_padding is None else traced.trimmed(rows_to_trim(args.trim_padding))


def _analysis(traced: TracedProgram, view: Render) -> list[str]:
    """The program after each pass that does not depend on the degrees."""
    seen: list[str] = []
    run_passes(
        traced.ir, analysis_passes(rows=traced.rows), lambda one, program: seen.append(_after(one, program, view))
    )
    return seen


def _after(one: Pass, program: Program, view: Render) -> str:
    return f"# after {one.name}\n{view(program)}"


def _view(args: argparse.Namespace, program: Program) -> Render:
    """How to print a program: whole, with every operator, or one block of it."""
    block = args.block
    if block is None:
        return lambda shown: program_text(shown, bodies=args.bodies)
    if block not in program.blocks:
        known = list(program.blocks)
        near = difflib.get_close_matches(block, known, n=1, cutoff=0.0)
        hint = f"nearest: {near[0]}; there are {', '.join(known)}" if near else "it has no shared blocks"
        raise XditError(f"{args.model} has no block {block!r}; {hint}")
    return lambda shown: body_text(shown, block) if block in shown.blocks else f"(no call of {block})"

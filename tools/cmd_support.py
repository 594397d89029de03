"""`xdit-ir support`: survey the zoo and write docs/support.md."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from xdit_ir import models
from xdit_ir.errors import XditError
from xdit_ir.tools.support_page import page
from xdit_ir.tools.survey import Survey, digest, survey
from xdit_ir.tools.terminal import progress_bar


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "support",
        help="what works for which model of the zoo: exactness, work, bytes, and what was refused and why",
        description="Capture every model of the zoo in tiny size, simulate all ranks of several sets of degrees, and "
        "print a table in Markdown. With --cache, an interrupted run goes on where it stopped, as long as the "
        "sources are the same.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="names of the zoo (default: all, and all decoders and encoders)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time (default: 1)")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep results in FILE, as lines of JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead")
    parser.add_argument(
        "--gpu", type=Path, metavar="FILE", help="a column of what tests/gpu/zoo.py has written to FILE (its --output)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Survey, then print the page or write it."""
    if args.jobs < 1:
        raise XditError(f"--jobs {args.jobs} is not a positive number; the nearest legal one is 1")
    names = _names(args.models)
    on_gpus = [] if args.gpu is None else _on_gpus(args.gpu)
    cached = _read(args.cache) if args.cache else {}
    missing = [name for name in names if name not in cached]
    with progress_bar() as progress:
        task = progress.add_task("surveying", total=len(names), completed=len(names) - len(missing))
        for one in _surveys(missing, args.jobs):
            cached[one.name] = one
            progress.update(task, advance=1, description=f"surveyed {one.name}")
            if args.cache:
                with args.cache.open("a") as stream:
                    stream.write(json.dumps({"digest": digest(), **one.as_json()}) + "\n")
    text = page([cached[name] for name in names], on_gpus)
    if args.output is None:
        print(text)
        return 0
    args.output.write_text(text + "\n")
    print(f"wrote {len(names)} models to {args.output}")
    return 0


def _names(given: Sequence[str]) -> list[str]:
    try:
        for name in given:
            models.entry(name)
    except models.UnknownModelError as error:
        raise XditError(str(error)) from None
    return sorted({name.partition(":")[0] for name in given}) or [*models.names(), *models.part_calls()]


def _on_gpus(path: Path) -> list[dict[str, Any]]:
    """The results in a file."""
    try:
        found = json.loads(path.read_text())
        missing = [one for one in found if not {"model", "degrees", "status"} <= one.keys()]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise XditError(f"--gpu {path} cannot be read ({error}); expected the --output of tests/gpu/zoo.py") from None
    if missing:
        raise XditError(f"--gpu {path}: {missing[0]} is no result; expected the --output of tests/gpu/zoo.py")
    return list(found)


def _read(path: Path) -> dict[str, Survey]:
    """Earlier results of the same sources."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    now = digest()
    return {line["name"]: Survey.from_json(line) for line in lines if line["digest"] == now}


def _surveys(names: Sequence[str], jobs: int) -> Iterator[Survey]:
    """Surveys in the order in which they are done."""
    if jobs == 1 or len(names) < 2:
        yield from map(survey, names)
        return
    # Forked from a process that has only imported: others may hang in the threads of torch.
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, mp_context=fresh, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for done in as_completed([pool.submit(survey, name) for name in names]):
            yield done.result()

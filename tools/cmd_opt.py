"""`xdit-ir opt`: run passes on the text of a program."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from xdit_ir.errors import XditError
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.registry import apply_passes, parse_passes
from xdit_ir.sharding.verify import verify
from xdit_ir.text import load, parse, save, write
from xdit_ir.tools.terminal import write_text


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "opt",
        help="run passes on the text of a program",
        description="Read a program (as written by `xdit-ir inspect MODEL --ir FILE`), run passes, verify after each, "
        "print the result as a text that can be read again.",
    )
    parser.add_argument("file", metavar="FILE", help="the program; - is standard input")
    parser.add_argument(
        "--passes",
        default="",
        metavar="LIST",
        help="such as find-tokens,shard-tokens{ulysses=2}; see `xdit-ir passes`; package.module:Class for one of yours",
    )
    parser.add_argument("--print-after-all", action="store_true", help="print the program after each pass, for reading")
    parser.add_argument("--diff", action="store_true", help="print what each pass changed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result, and its tensors, to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the result, or what the passes made on the way."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # passes of the caller's own
    steps = parse_passes(args.passes)
    program = parse(sys.stdin.read()) if args.file == "-" else load(args.file)
    verify(program, "reading")
    before = [program_text(program, bodies=True)]

    def after(one: Pass, made: Program) -> None:
        text = program_text(made, bodies=True)
        if args.diff:
            write_text(_diff(before[-1], text, one.name))
        elif args.print_after_all:
            write_text(f"// after {one.name}\n{text}\n")
        before.append(text)

    result = apply_passes(program, steps, after)
    if args.output is not None:
        files = save(result, args.output)
        print(f"wrote {' and '.join(map(str, files))}")
    elif not (args.diff or args.print_after_all):
        write_text(_complete(result).rstrip())
    return 0


def _diff(before: str, after: str, name: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", name, lineterm="", n=1)
    return "\n".join(lines) or f"--- {name} changed nothing"


def _complete(program: Program) -> str:
    document = write(program)
    if document.attachments:
        raise XditError(
            f"the program has {len(document.attachments)} tensors or modules that a text alone cannot hold: "
            "give --output FILE, which writes tensors beside it"
        )
    return document.text

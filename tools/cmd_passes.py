"""`xdit-ir passes`: what passes there are, and what they do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from xdit_ir.passes.order import PASSES
from xdit_ir.passes.registry import Described, describe
from xdit_ir.tools.terminal import write


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "passes",
        help="list the passes, their options and what they do to results",
        description="List the passes in the order in which they run. Numerics: exact (bit-equal), reassociated (sums "
        "in another order), stale (values of the step before, after the warmup steps), rounded (values in fewer bits). "
        "What a pass needs of a program, another one gives it.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table."""
    table = Table("pass", "numerics", "options", "what it does", show_lines=True)
    for kind in PASSES:
        one = describe(kind)
        table.add_row(one.name, one.numerics, _options(one), "\n".join([one.does, *_facts(one)]))
    write(table)
    return 0


def _options(one: Described) -> str:
    return "\n".join(f"{name}={default}" for name, default in one.options.items()) or "-"


def _facts(one: Described) -> Iterator[str]:
    for what, names in (("Needs", one.requires), ("Gives", one.provides)):
        if names:
            yield f"{what}: {', '.join(names)}"

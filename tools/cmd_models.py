"""`xdit-ir models`: the zoo."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from xdit_ir import models
from xdit_ir.tools.terminal import progress_bar, write


def add_parser(commands: Any) -> None:
    """Describe the command to argparse."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "models",
        help="list the zoo",
        description="List the models of the zoo in their published sizes; each is also there as NAME:tiny.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table; models are made on the meta device, so nothing of their size is allocated."""
    table = Table("name", "class", caption="append :tiny for a few narrow layers of every kind the model has")
    table.add_column("parameters", justify="right")
    with progress_bar() as progress:
        for name in progress.track(models.names(), description="reading the zoo"):
            data = models.entry(name)
            table.add_row(name, data.cls, "only :tiny" if data.full is None else _size(name))
    write(table)
    return 0


def _size(name: str) -> str:
    model, _ = models.load(name, device="meta")
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} billion"

"""What the commands share: how text, tables and progress reach a terminal, a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

LAYOUT_STYLES = {
    r"(?m)^(program|block|return|# .*)\b": "bold",
    r"%\w+": "cyan",
    r"/(\w+|\([\w*]+\))": "bold magenta",
    r"\b(all_to_all|all_reduce|reduce_scatter|gather|halo_exchange|ring_attention)(?=\()": "bold yellow",
}


def write_text(text: str) -> None:
    """Print IR to standard output: with colours on a terminal, byte for byte otherwise."""
    if not sys.stdout.isatty():
        print(text)
        return
    Console().print(coloured(text), soft_wrap=True)


def coloured(text: str) -> Text:
    """IR with its layouts and communications standing out."""
    result = Text(text)
    for pattern, style in LAYOUT_STYLES.items():
        result.highlight_regex(pattern, style)
    return result


def write(renderable: RenderableType) -> None:
    """Print a table or a panel to standard output."""
    Console(highlight=False).print(renderable)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while something slow runs; nothing if that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def progress_bar() -> Progress:
    """Progress on standard error that disappears when done; disabled if that is no terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

"""What the demo shows on rank 0."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import fx

from xdit_ir.api import ParallelProgram
from xdit_ir.ir import ops
from xdit_ir.ir.difference import relative_error
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import node_type, program_text, target_name
from xdit_ir.ir.program import Program, called_block, where_of
from xdit_ir.tools.terminal import coloured

CONSOLE = Console(highlight=False)
GAP = 8  # white pixels between the lines of pictures


@dataclass(frozen=True)
class ModeRow:
    """The images of one mode: how far those of any rank are from the single process's, and how many are recognised."""

    name: str
    largest: float
    relative: float
    recognised: float
    exact: bool

    @staticmethod
    def of(
        name: str, images: Sequence[torch.Tensor], expected: torch.Tensor, recognised: float, *, exact: bool
    ) -> ModeRow:
        """Over all ranks: the largest absolute difference, and the largest relative one in the Frobenius norm."""
        if any(one.shape != expected.shape for one in images):
            return ModeRow(name, float("inf"), float("inf"), recognised, exact)
        largest = max((one - expected).abs().max().item() for one in images)
        return ModeRow(name, largest, max(relative_error([one], [expected]) for one in images), recognised, exact)

    def passes(self, tolerance: float) -> bool:
        """Equal, or where stale keys and values are the method: every digit recognised."""
        return self.relative <= tolerance if self.exact else self.recognised == 1.0


class Stages:
    """A spinner on a terminal while a stage runs, and a line for each finished one."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """One stage."""
        start = time.perf_counter()
        with CONSOLE.status(what) if self.shown and CONSOLE.is_terminal else nullcontext():
            yield
        if self.shown:
            CONSOLE.print(f"{what:<45} {time.perf_counter() - start:6.2f} s")


def introduction(modes: Mapping[str, Mapping[str, int]]) -> None:
    """What is going to happen."""
    lines = "\n".join(
        f"    xir.port(pipe, {', '.join(f'{name}={size}' for name, size in degrees.items())})"
        for degrees in modes.values()
    )
    CONSOLE.print(
        Panel(
            "A diffusers DiTPipeline with trained weights makes ten digits in one process. Then one line, one of\n\n"
            f"{lines}\n\n"
            "and the same, unmodified pipeline makes them again on all processes, which share the work. They must "
            "be equal; those of PipeFusion, which attends to keys and values of the step before, must be as good.",
            title="xdit-ir",
        )
    )


def program(parallel: ParallelProgram) -> None:
    """The program before and after, its report, and one block's communication."""
    CONSOLE.rule("captured from the model")
    CONSOLE.print(coloured(program_text(parallel.original)), soft_wrap=True)
    CONSOLE.rule("what the ranks run")
    CONSOLE.print(coloured(str(parallel)), soft_wrap=True)
    CONSOLE.rule("report")
    CONSOLE.print(str(parallel.report()).rstrip(), markup=False, soft_wrap=True)
    CONSOLE.rule("communication in one block, and the line of the model that caused it")
    _communication(parallel.ir)


def _communication(divided: Program) -> None:
    calls = [called_block(call) for call in divided.calls]
    found = {name: list(filter(_communicates, block.graph.nodes)) for name, block in divided.blocks.items()}
    name, nodes = next(((name, nodes) for name, nodes in found.items() if nodes), ("", []))
    if not nodes:
        CONSOLE.print("no block communicates: only the outputs are gathered")
        return
    CONSOLE.print(f"{name}, called {calls.count(name)} times a forward:")
    for line, count in Counter(_caused(node, divided.mesh) for node in nodes).items():
        CONSOLE.print(coloured(f"{count} x {line}"), soft_wrap=True)


def _caused(node: fx.Node, mesh: Mesh | None) -> str:
    """A communication's types before and after, and where it comes from."""
    where = where_of(node)
    before, after = node_type(node.all_input_nodes[0], mesh), node_type(node, mesh)
    return f"{target_name(node.target)}(): {before} -> {after}\n      {where.module}, {where.source}"


def _communicates(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is ops.shard:
        return False
    return node.target is ops.ring_attention or ops.is_relayout(node.target)


def results(rows: Sequence[ModeRow], tolerance: float) -> None:
    """One row for each mode."""
    CONSOLE.rule("is every rank's image the single-process image?")
    table = Table("", "largest difference (of 1.0)", "relative difference", "digits recognised", "verdict")
    for row in rows:
        good = "equal" if row.exact else "as good"
        verdict = f"[green]{good}[/]" if row.passes(tolerance) else f"[bold red]NOT {good.upper()}[/]"
        table.add_row(row.name, f"{row.largest:.2e}", f"{row.relative:.2e}", f"{row.recognised:.0%}", verdict)
    CONSOLE.print(table)
    CONSOLE.print(f"(equal: within {tolerance:.0e}; times above include tracing, of a tiny model, on shared CPU cores)")


def save(pictures: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a sheet: a line of digits [10, 1, 64, 64] for each mode, with its name."""
    from PIL import Image, ImageDraw

    side, margin = next(iter(pictures.values())).shape[-1], 100
    sheet = Image.new("L", (margin + 10 * side, len(pictures) * (side + GAP)), 255)
    draw = ImageDraw.Draw(sheet)
    for line, (name, images) in enumerate(pictures.items()):
        top = line * (side + GAP)
        draw.text((GAP, top + side // 2), name, fill=0)
        pixels = (torch.cat(list(images), dim=2)[0].clamp(0, 1) * 255).round().to(torch.uint8)
        sheet.paste(Image.fromarray(pixels.numpy()), (margin, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    CONSOLE.print(f"a line for each: {path}", soft_wrap=True)

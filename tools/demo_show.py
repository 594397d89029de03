"""What the demo shows on rank 0."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import fx

from xdit_ir import ops
from xdit_ir.api import ParallelProgram
from xdit_ir.difference import relative_error
from xdit_ir.mesh import Mesh
from xdit_ir.printer import node_type, program_text, target_name
from xdit_ir.program import Program, where_of
from xdit_ir.tools.degrees import Degrees
from xdit_ir.tools.terminal import coloured

CONSOLE = Console(highlight=False)
GAP = 8  # white pixels between the pictures


@dataclass(frozen=True)
class Difference:
    """How far one rank's image is from the single-process image."""

    largest: float
    relative: float

    @staticmethod
    def of(image: torch.Tensor, expected: torch.Tensor) -> Difference:
        """Largest absolute difference, and the relative one in the Frobenius norm."""
        if image.shape != expected.shape:
            return Difference(float("inf"), float("inf"))
        return Difference((image - expected).abs().max().item(), relative_error([image], [expected]))


class Stages:
    """Progress bars on a terminal, a line for each finished stage elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown

    @contextmanager
    def __call__(self, what: str, steps: int = 1) -> Iterator[Callable[[], object]]:
        """One stage; call what this gives `steps` times, or never."""
        start = time.perf_counter()
        columns = TextColumn("{task.description:<45}"), BarColumn(), TimeElapsedColumn()
        bars = self.shown and CONSOLE.is_terminal
        with Progress(*columns, console=CONSOLE, disable=not bars) as progress:
            task = progress.add_task(what, total=steps)
            yield lambda: progress.advance(task)
            progress.update(task, completed=steps)
        seconds = time.perf_counter() - start
        if self.shown and not bars:
            CONSOLE.print(f"{what:<45} {seconds:6.2f} s")


def introduction(degrees: Degrees) -> None:
    """What is going to happen."""
    named = ", ".join(f"{name}={size}" for name, size in degrees.as_dict().items() if size > 1) or "ulysses=1"
    CONSOLE.print(
        Panel(
            "A diffusers FluxPipeline with random weights makes an image in one process. Then one line,\n\n"
            f"    pipe.transformer = xir.port(pipe.transformer, {named})\n\n"
            f"and the same, unmodified pipeline makes it again on {degrees.ranks} processes that share the "
            "work. The images must be equal.",
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
    calls = [str(call.args[0]) for call in divided.calls]
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


def differences(found: list[Difference], tolerance: float) -> None:
    """One row per rank."""
    CONSOLE.rule("is every rank's image the single-process image?")
    table = Table("rank", "largest difference (of 1.0)", "relative difference", f"tolerance {tolerance:.0e}")
    for rank, one in enumerate(found):
        verdict = "[green]equal[/]" if one.relative <= tolerance else "[bold red]DIFFERENT[/]"
        table.add_row(str(rank), f"{one.largest:.2e}", f"{one.relative:.2e}", verdict)
    CONSOLE.print(table)
    CONSOLE.print("(times above: a tiny model on the CPU, where two processes gain nothing; they exchange for real)")


def save(alone: torch.Tensor, together: torch.Tensor, path: Path) -> None:
    """Write both images (a row for each of a batch) side by side: one process left, all together right."""
    from PIL import Image

    left, right = (torch.cat(list(images), dim=1) for images in (alone, together))
    picture = torch.cat([left, left.new_ones(3, left.shape[1], GAP), right], dim=2)
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)
    CONSOLE.print(f"one process (left) and all together (right): {path}", soft_wrap=True)

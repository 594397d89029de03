"""What a parallel program costs and where it fell back, as data and as a table."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs, operands
from xdit_ir.ir.layout import kind
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.printer import target_name
from xdit_ir.ir.program import LAYOUT, SPEC, Program, where_of
from xdit_ir.rules.base import dividing_dims_of
from xdit_ir.sharding.cost import program_flops, relayout_bytes, ring_bytes, ring_dims
from xdit_ir.sharding.propagate import FALLBACK

UNDIVIDED = "no stream of tokens can be divided: along ulysses and ring every rank computes the same"


@dataclass(frozen=True)
class Collective:
    """All communications of one kind along one mesh dim (several joined by `*`): calls in a forward, and bytes that
    the busiest rank sends in all of them together."""

    kind: str
    mesh_dim: str
    count: int
    bytes_per_rank: int


@dataclass(frozen=True)
class Fallback:
    """An operator whose operand had to be gathered: where, why, and what that sends from the busiest rank."""

    op: str
    place: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Report:
    """FLOPs of one forward and bytes of weights, on one device and per rank; communication; fallbacks; and what is read
    of inputs at every call whose inputs are new.

    Under PipeFusion a forward is a displaced step, and ranks keep buffers between steps.
    """

    flops_total: int
    flops_per_rank: list[int]
    weight_bytes_total: int
    weight_bytes_per_rank: list[int]
    collectives: list[Collective]
    fallbacks: list[Fallback]
    buffer_bytes_per_rank: list[int] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)

    @property
    def weight_share(self) -> float:
        """The part of the model's weights that the fullest rank has."""
        return max(self.weight_bytes_per_rank) / self.weight_bytes_total

    def __str__(self) -> str:
        """A table."""
        stream = io.StringIO()
        console = Console(file=stream, width=110, color_system=None)
        slowest = max(self.flops_per_rank) / max(self.flops_total, 1)
        work = sum(self.flops_per_rank) / max(self.flops_total, 1)
        console.print(
            f"{self.flops_total / 1e12:.4g} TFLOP a forward; the slowest of {len(self.flops_per_rank)} ranks does "
            f"{slowest:.4f} of it, all together {work:.4f}; weights {max(self.weight_bytes_per_rank) / 2**20:.1f} MiB "
            f"a rank of {self.weight_bytes_total / 2**20:.1f} MiB",
            soft_wrap=True,
        )
        if any(self.buffer_bytes_per_rank):
            console.print(f"buffers that outlive a step: {max(self.buffer_bytes_per_rank) / 2**20:.1f} MiB a rank")
        table = Table("collective", "mesh dim", "count", "MiB sent by the busiest rank")
        for entry in self.collectives:
            table.add_row(entry.kind, entry.mesh_dim, str(entry.count), f"{entry.bytes_per_rank / 2**20:.3f}")
        console.print(table)
        if self.fallbacks:
            table = Table("fallback: gathered for", "place", "reason", "MiB")
            for item in self.fallbacks:
                table.add_row(item.op, item.place, item.reason, f"{item.bytes / 2**20:.3f}")
            console.print(table)
        else:
            console.print("no fallbacks: nothing is gathered inside a block for want of a rule")
        for read in self.reads:
            console.print(f"a call with new inputs waits for the device to read {read}", soft_wrap=True)
        return stream.getvalue()


def read_at_calls(original: Program) -> list[str]:
    """What a call with new inputs reads of them, by input and reason."""
    return [f"{', '.join(fact.paths)}: {fact.reason}" for fact in original.signature.predicates]


def make_report(original: Program, program: Program) -> Report:
    """The report of a program with layouts, compared with the program that it was made from."""
    mesh = program.mesh
    assert mesh is not None
    weights = sum(spec.nbytes for spec in program.state.values())
    return Report(
        flops_total=program_flops(original, None)[0],
        flops_per_rank=program_flops(program, mesh),
        weight_bytes_total=weights,
        weight_bytes_per_rank=_weight_bytes(program, mesh),
        collectives=_collectives(program, mesh),
        fallbacks=list(find_fallbacks(program, mesh)),
        reads=read_at_calls(original),
    )


def _weight_bytes(program: Program, mesh: Mesh) -> list[int]:
    """Bytes of the weights that each rank holds, by the layouts that they have."""
    weights = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    held = [node for name, node in weights.items() if name in program.state]
    sizes = [
        [math.prod(n.meta[LAYOUT].local_shape(n.meta[SPEC].shape, rank)) for n in held]
        for rank in range(mesh.world_size)
    ]
    return [sum(size * n.meta[SPEC].dtype.itemsize for size, n in zip(one, held, strict=True)) for one in sizes]


def _collectives(program: Program, mesh: Mesh) -> list[Collective]:
    counts: dict[tuple[str, str], int] = {}
    sent: dict[tuple[str, str], list[int]] = {}
    for _, graph, times in all_graphs(program):
        for node in graph.nodes:
            found = traffic(node, mesh)
            if found is None:
                continue
            key, amounts = found
            counts[key] = counts.get(key, 0) + times
            before = sent.get(key, [0] * mesh.world_size)
            sent[key] = [a + times * b for a, b in zip(before, amounts, strict=True)]
    return [Collective(*key, counts[key], max(sent[key])) for key in sorted(counts)]


def traffic(node: fx.Node, mesh: Mesh) -> tuple[tuple[str, str], tuple[int, ...]] | None:
    """The kind and mesh dims of a communication, and bytes per rank; None for what is local."""
    if node.op != "call_function":
        return None
    if node.target is ops.ring_attention:
        return ("ring_attention", "*".join(ring_dims(node, mesh))), ring_bytes(node, mesh)
    if not ops.communicates(node.target):
        return None
    have, want = operands(node)[0].meta[LAYOUT], node.meta[LAYOUT]
    dims = mesh.ordered(have.partial - want.partial) if node.target in ops.SUMS else kind(mesh, have, want)[1]
    return (target_name(node.target), "*".join(dims)), relayout_bytes(node, mesh)


def find_gathers(program: Program) -> Iterator[str]:
    """Every gather inside a block, whatever it is for: the operators that need it, and where."""
    for name, block in program.blocks.items():
        for node in block.graph.nodes:
            if node.target is ops.gather:
                names = (user.op if user.op == "output" else target_name(user.target) for user in node.users)
                users = ", ".join(dict.fromkeys(names))
                where = where_of(node)
                yield f"{users}: {' '.join(part for part in (name, where.module, node.name, where.source) if part)}"


def find_fallbacks(program: Program, mesh: Mesh) -> Iterator[Fallback]:
    """Operators for which something had to be gathered; or all of them, where nothing is divided."""
    nodes = (node for _, graph, _ in all_graphs(program) for node in graph.nodes)
    if mesh.size(SEQUENCE) > 1 and not any(dividing_dims_of(node, mesh) & {*SEQUENCE} for node in nodes):
        yield Fallback("forward", "the whole model", UNDIVIDED, 0)
    for name, graph, times in all_graphs(program):
        for node in graph.nodes:
            reason = node.meta.get(FALLBACK, "")
            gathered = [s for s in operands(node) if s.target is ops.gather] if node.op == "call_function" else []
            wanted = name and gathered and node.target not in ops.ATTENTIONS
            if not reason and not wanted:
                continue
            where = where_of(node)
            bytes_sent = times * sum(max(relayout_bytes(source, mesh)) for source in gathered)
            place = " ".join(part for part in (name, where.module, node.name, where.source) if part)
            yield Fallback(target_name(node.target), place, reason or "needs the dimension whole", bytes_sent)

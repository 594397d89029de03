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
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import target_name
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.sharding.cost import program_flops, relayout_bytes, ring_bytes, ring_dims, talking_dims
from xdit_ir.sharding.fallbacks import Fallback, find_fallbacks
from xdit_ir.sharding.gathered_weights import NONE_GATHERED, GatheredWeights, gathered_weights, gathers_weights
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.sharding.memory import Memory, memory_per_rank
from xdit_ir.sharding.regions import NOTABLE, Idle, Region, find_idle, find_regions, region_flops, region_names

NO_FALLBACKS = "no fallbacks: no operator needed a divided dimension whole"
# A region's slowest rank may do so much more than a fair share before it is listed.
UNEVEN = 1.05


@dataclass(frozen=True)
class Collective:
    """All communications of one kind along one mesh dim (several joined by `*`): calls in a forward, and bytes that
    the busiest rank sends in all of them together."""

    kind: str
    mesh_dim: str
    count: int
    bytes_per_rank: int


@dataclass(frozen=True)
class CacheUse:
    """How many of the calls so far reused a region of blocks, by this rule (`cache` of `port`)."""

    rule: str
    calls: int
    skipped: int

    def __str__(self) -> str:
        return f"cache {self.rule}: {self.skipped} of {self.calls} calls reused what an earlier one has computed"


@dataclass(frozen=True)
class Report:
    """FLOPs of one forward and bytes of weights, on one device and per rank; communication; fallbacks; how regions of
    the model are shared, and ranks that idle; and what is read of inputs at every call whose inputs are new.

    Under PipeFusion a forward is a displaced step, and ranks keep buffers between steps; `full`: what these would be
    without `kv_cache_dtype`. `forwards` are run at a time,
    each by a part of the ranks: more than one where parts of `cfg` run different calls. `execution`, of a port: how
    this rank runs it. `gathered`: of weights that ranks hold in parts. `memory`: of each rank. `cache`: how often a
    step cache was of use.
    """

    flops_total: int
    flops_per_rank: list[int]
    weight_bytes_total: int
    weight_bytes_per_rank: list[int]
    collectives: list[Collective]
    fallbacks: list[Fallback]
    buffer_bytes_per_rank: list[int] = field(default_factory=list)
    full_buffer_bytes_per_rank: list[int] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    forwards: int = 1
    execution: str = ""
    gathered: GatheredWeights = NONE_GATHERED
    memory: list[Memory] = field(default_factory=list)
    cache: CacheUse | None = None

    @property
    def share(self) -> float:
        """The part of a forward's FLOPs that the slowest rank does."""
        return max(self.flops_per_rank) / max(self.flops_total, 1)

    @property
    def fair_share(self) -> float:
        """What it would be if ranks shared the work evenly."""
        return self.forwards / len(self.flops_per_rank)

    @property
    def weight_share(self) -> float:
        """The part of the model's weights that the fullest rank has."""
        return max(self.weight_bytes_per_rank) / self.weight_bytes_total

    @property
    def buffers(self) -> str:
        """MiB of the fullest rank's buffers, and what they would be with all keys and values in the model's dtype."""
        most, full = max(self.buffer_bytes_per_rank), max(self.full_buffer_bytes_per_rank)
        text = f"{most / 2**20:.1f} MiB a rank"
        return text if most == full else f"{text} ({full / 2**20:.1f} MiB with keys and values in the model's dtype)"

    @property
    def uneven(self) -> list[Region]:
        """The regions of which the slowest rank does more than a fair share, worst first."""
        cost = {region.name: (region.share - self.fair_share) * region.flops_total for region in self.regions}
        notable = [one for one in self.regions if one.flops_total >= NOTABLE * self.flops_total]
        found = [region for region in notable if region.share > UNEVEN * self.fair_share]
        return sorted(found, key=lambda region: -cost[region.name])

    def part(self, flops: int) -> str:
        """FLOPs as a part of a forward's."""
        return f"{flops / max(self.flops_total, 1):.4f}"

    def reason(self, item: Fallback) -> str:
        """Why something was gathered, and what follows from it."""
        many = item.repeated >= NOTABLE * self.flops_total > 0
        return f"{item.reason}; every rank repeats {self.part(item.repeated)} of all FLOPs" if many else item.reason

    def __str__(self) -> str:
        """A table."""
        stream = io.StringIO()
        console = Console(file=stream, width=110, color_system=None)
        for part in self._parts():
            console.print(part, soft_wrap=isinstance(part, str))
        return stream.getvalue()

    def _parts(self) -> Iterator[str | Table]:
        work = sum(self.flops_per_rank) / max(self.flops_total, 1)
        yield (
            f"{self.flops_total / 1e12:.4g} TFLOP a forward; the slowest of {len(self.flops_per_rank)} ranks does "
            f"{self.share:.4f} of it, all together {work:.4f}; weights {max(self.weight_bytes_per_rank) / 2**20:.1f} "
            f"MiB a rank of {self.weight_bytes_total / 2**20:.1f} MiB"
        )
        if self.gathered.total:
            yield (
                f"ranks hold parts of weights: {self.gathered.total / 2**20:.1f} MiB are gathered a forward, "
                f"{self.gathered.most / 2**20:.1f} MiB of them are there at a time"
            )
        if self.gathered.uploaded:
            yield self.gathered.upload_text
        if self.memory:
            yield f"the fullest rank needs {max(self.memory, key=lambda one: one.total)}"
        if any(self.buffer_bytes_per_rank):
            yield f"buffers that outlive a step: {self.buffers}"
        if self.uneven:
            rows = [[one.name, self.part(one.flops_total), f"{one.share:.4f}"] for one in self.uneven]
            yield _table(["not shared evenly", "of all FLOPs", "the slowest rank's part"], rows)
        yield from map(str, self.idle)
        sent = [[one.kind, one.mesh_dim, str(one.count), _mib(one.bytes_per_rank)] for one in self.collectives]
        yield _table(["collective", "mesh dim", "count", "MiB sent by the busiest rank"], sent)
        if self.fallbacks:
            rows = [[item.op, item.place, self.reason(item), _mib(item.bytes)] for item in self.fallbacks]
            yield _table(["fallback: gathered for", "place", "reason", "MiB"], rows)
        else:
            yield NO_FALLBACKS
        yield from (f"a call with new inputs waits for the device to read {read}" for read in self.reads)
        if self.cache is not None:
            yield str(self.cache)
        if self.execution:
            yield f"runs {self.execution}"


def _table(head: list[str], rows: list[list[str]]) -> Table:
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    return table


def _mib(count: int) -> str:
    return f"{count / 2**20:.3f}"


def read_at_calls(original: Program) -> list[str]:
    """What a call with new inputs reads of them, by input and reason."""
    return [f"{', '.join(fact.paths)}: {fact.reason}" for fact in original.signature.predicates]


def make_report(original: Program, program: Program, forwards: int = 1, machine: Machine = H100) -> Report:
    """The report of a program with layouts, compared with the program that it was made from; `forwards` of it are run
    at a time, each by a part of the ranks. What is hidden of uploads is said for `machine`."""
    mesh = program.mesh
    assert mesh is not None
    weights = sum(spec.nbytes for spec in program.state.values())
    total, ranks = program_flops(original, None)[0], program_flops(program, mesh)
    names = region_names(program)
    regions = find_regions(region_flops(program, names, None), region_flops(program, names, mesh))
    gathered = gathered_weights(program, machine)
    return Report(
        flops_total=total,
        flops_per_rank=ranks,
        weight_bytes_total=weights,
        weight_bytes_per_rank=_weight_bytes(program, mesh),
        collectives=_collectives(program, mesh),
        fallbacks=list(find_fallbacks(program, mesh)),
        reads=read_at_calls(original),
        regions=regions,
        idle=list(find_idle(ranks, forwards / mesh.world_size, total, regions)),
        forwards=forwards,
        gathered=gathered,
        memory=memory_per_rank(program, mesh, gathered),
    )


def _weight_bytes(program: Program, mesh: Mesh) -> list[int]:
    """Bytes of the weights that each rank holds, by the layouts that they have."""
    weights = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    held = [node for name, node in weights.items() if name in program.state or name in program.stored]
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
    dims = talking_dims(node, mesh)
    name = "gather of weights" if gathers_weights(node) else target_name(node.target)
    return (name, "*".join(dims)), relayout_bytes(node, mesh)

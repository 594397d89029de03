"""How long operators take on every rank, from sizes and what a machine can do: one estimate for all that asks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.flops import first_of
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.planning.hardware import Hardware
from xdit_ir.planning.work import Fusion, WorkKind, kind_of, local_bytes, product_bytes, results
from xdit_ir.sharding.buffer_access import over_time
from xdit_ir.sharding.cost import local_flops, partners
from xdit_ir.sharding.report import traffic

# Of what the bus gives one GPU, each of several that upload at once: tests/gpu/streaming.py, 50 of 55 GB/s for two.
AT_ONCE = 0.91


@dataclass(frozen=True)
class Cost:
    """Seconds on every rank; `travels`: an exchange, of this kind over these mesh dims, or an upload, over none.
    `around`: seconds in which keys and values travel around a ring, beside the work. `hidden`: the processor works on
    meanwhile. `kept`: seconds in which it copies what stays on the rank. `starts`: kernels."""

    seconds: tuple[float, ...]
    sent: tuple[int, ...]
    work: WorkKind = WorkKind.VIEW
    kind: str = ""
    over: tuple[str, ...] = ()
    travels: bool = False
    hidden: bool = True
    starts: int = 1
    kept: tuple[float, ...] = ()
    around: tuple[float, ...] = ()


class Durations:
    """Of the operators of one program. `over_time`: changes of layout over time are reads and writes of buffers.
    `flash`: attention by FlashAttention as installed, instead of PyTorch's."""

    def __init__(self, mesh: Mesh, hardware: Hardware, *, over_time: bool = False, flash: bool = False) -> None:
        self.mesh, self.hardware, self.over_time, self.flash = mesh, hardware, over_time, flash
        self._known: dict[fx.Node, Cost] = {}
        self._fusions: dict[fx.Graph, Fusion] = {}

    def of(self, node: fx.Node) -> Cost:
        """What an operator costs."""
        if node not in self._known:
            self._known[node] = self._cost(node)
        return self._known[node]

    def _cost(self, node: fx.Node) -> Cost:
        idle = (0,) * self.mesh.world_size
        if self.over_time and over_time(node, self.mesh):
            return Cost(self._copied(node), idle, WorkKind.MEMORY)
        if node.target is ops.upload:
            sizes = tuple(local_bytes(node, rank) for rank in range(self.mesh.world_size))
            given = self.hardware.machine.upload * (AT_ONCE if self.mesh.world_size > 1 else 1)
            seconds = tuple(size / given for size in sizes)
            return Cost(seconds, sizes, WorkKind.EXCHANGE, ops.upload.__name__, travels=True)
        found = traffic(node, self.mesh)
        if found is None:
            return Cost(self._worked(node), idle, kind_of(node), starts=self._starts(node))
        (kind, over), sent = found
        dims = tuple(over.split("*"))
        groups = [self.mesh.group(rank, dims) for rank in range(self.mesh.world_size)]
        links = [self.hardware.link(group) for group in groups]
        if node.target is ops.ring_attention:  # each hop waits for the slowest
            hops = len(groups[0]) - 1
            seconds = tuple(hops * link.seconds(each / hops) for link, each in zip(links, sent, strict=True))
            merged = self._merged(node, hops)
            worked = tuple(max(a, b) + c for a, b, c in zip(self._worked(node), seconds, merged, strict=True))
            return Cost(worked, sent, WorkKind.ATTENTION, kind, around=seconds)
        hidden = all(link.hidden for link in links)
        peers = partners(node, self.mesh)
        seconds = tuple(self.hardware.seconds(rank, peers[rank], amount) for rank, amount in enumerate(sent))
        return Cost(
            seconds, sent, WorkKind.EXCHANGE, kind, dims, travels=True, hidden=hidden, kept=self._kept(node, sent)
        )

    def _merged(self, node: fx.Node, hops: int) -> tuple[float, ...]:
        """Time of attention kernels that begin anew at each hop of a ring, and of joining partial results."""
        sizes = (local_bytes(node, rank) for rank in range(self.mesh.world_size))
        return tuple(hops * self.hardware.kernels.joining_seconds(size) for size in sizes)

    def _kept(self, node: fx.Node, sent: tuple[int, ...]) -> tuple[float, ...]:
        """Time of copying to its new place what a rank does not send."""
        kernels, (source, *_) = self.hardware.kernels, operands(node)
        stays = [max(local_bytes(source, rank) - amount, 0) for rank, amount in enumerate(sent)]
        return tuple(kernels.gap + kernels.memory_seconds(2 * amount) if amount else 0.0 for amount in stays)

    def _worked(self, node: fx.Node) -> tuple[float, ...]:
        kernels, ranks, what = self.hardware.kernels, range(self.mesh.world_size), kind_of(node)
        if what is WorkKind.MEMORY:
            return self._fused(node)
        if what not in (WorkKind.PRODUCT, WorkKind.ATTENTION):
            return (0.0,) * len(ranks)
        flops, dtype = local_flops(node, self.mesh), first_of(node.meta[SPEC]).dtype
        if what is WorkKind.PRODUCT:
            sizes = results(node, self.mesh)
            return tuple(
                kernels.product_seconds(flops[rank], sizes[rank], product_bytes(node, rank), dtype) for rank in ranks
            )
        queries, keys, *_ = operands(node)
        width = queries.meta[SPEC].shape[-1]
        whole = (kernels.in_tiles(_rows(queries, rank)) * kernels.in_tiles(_rows(keys, rank)) for rank in ranks)
        computed = (each * more for each, more in zip(flops, whole, strict=True))
        return tuple(kernels.attention_seconds(each, width, dtype, flash=self.flash) for each in computed)

    def _starts(self, node: fx.Node) -> int:
        """Kernels: of those that are fused, those count that write."""
        return int(kind_of(node) is not WorkKind.MEMORY or self._fusion(node.graph).moved[node].writes)

    def _fusion(self, graph: fx.Graph) -> Fusion:
        if graph not in self._fusions:
            self._fusions[graph] = Fusion(graph)
        return self._fusions[graph]

    def _fused(self, node: fx.Node) -> tuple[float, ...]:
        """Time of what this operator adds to the kernel that it is fused into."""
        moved, kernels = self._fusion(node.graph).moved[node], self.hardware.kernels
        written = [node] if moved.writes else []
        values = [*moved.reads, *written]
        start = kernels.gap if moved.writes else 0.0
        amounts = (sum(local_bytes(one, rank) for one in values) for rank in range(self.mesh.world_size))
        return tuple(start + kernels.memory_seconds(amount) if amount else 0.0 for amount in amounts)

    def _copied(self, node: fx.Node) -> tuple[float, ...]:
        """Time of writing a value into a buffer."""
        amounts = (local_bytes(operands(node)[0], rank) for rank in range(self.mesh.world_size))
        return tuple(self.hardware.kernels.memory_seconds(2 * amount) for amount in amounts)


def _rows(value: fx.Node, rank: int) -> int:
    """Queries or keys that a rank has of this value."""
    spec, layout = value.meta[SPEC], value.meta.get(LAYOUT)
    return int((spec if layout is None else spec.on(layout, rank)).shape[-2])

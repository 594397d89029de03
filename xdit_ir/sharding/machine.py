"""The prices of all choices: what operators and exchanges take on a machine, handed to every pass that chooses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.flops import first_of, is_counted
from xdit_ir.ir.graphs import all_graphs, operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.sharding.cost import Placed, Results, local_flops, step_flops, written_bytes
from xdit_ir.sharding.speeds import JOINED, Kernels, Link, Links

# How often ranks send so many bytes (of each rank) along which mesh dims.
Traffic = Counter[tuple[tuple[str, ...], tuple[int, ...]]]
# Of an H100, see `planning/machines`.
GAP = 4.5e-6
# A unit of work, in seconds, where it depends on more than FLOPs.
TICK = 1e-12


@dataclass(frozen=True)
class Machine:
    """Speeds of a GPU and of its links, as averages over a forward: FLOP/s of a rank, bytes/s that it can send and that
    its memory can write, the seconds before the first byte arrives, and bytes/s that it reads of the host's memory.
    Defaults: H100 on NVLink.

    Where more is known of it, `kernels` and `links` price by size, kind and place instead: those of the machine that
    a plan is made for.

    Raises:
        ParallelizeError: a speed is no positive number, or the latency a negative one.
    """

    flops: float = 500e12
    bytes: float = 200e9
    memory: float = 1.5e12
    latency: float = 15e-6
    upload: float = 50e9
    kernels: Kernels | None = None
    links: Links | None = None

    def __post_init__(self) -> None:
        for name, default in SPEEDS.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and name == "latency")):
                raise ParallelizeError(f"Machine({name}={value!r}): expected a positive number, such as {default:g}")

    def __str__(self) -> str:
        links = f"{self.bytes / 1e9:g} GB/s to other ranks after {self.latency * 1e6:g} µs"
        return f"{self.flops / 1e12:g} TFLOP/s, {self.memory / 1e9:g} GB/s of memory, {links}"

    @staticmethod
    def parse(text: str) -> Machine:
        """`bytes=25e9,latency=30e-6`; speeds that are not named are those of the default.

        Raises:
            ParallelizeError: a machine has no such speed, or it is no number of the right sign.
        """
        given = dict[str, Any]()
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            try:
                given[name] = float(value)
                Machine(**{name: SPEEDS[name], **given})
            except (KeyError, ValueError, ParallelizeError):
                raise ParallelizeError(
                    f"{item.strip()!r} is no speed of a machine: expected {', '.join(SPEEDS)} with a number, such as "
                    "bytes=25e9"
                ) from None
        return Machine(**given)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Machine:
        """From plain values, as `dataclasses.asdict` makes them.

        Raises:
            TypeError, LookupError: they are none of a machine.
        """
        kernels, links = data.get("kernels"), data.get("links")
        known = None if kernels is None else Kernels(**kernels)
        reach = None if links is None else Links(tuple(Link(**link) for link in links["each"]))
        return Machine(**{**data, "kernels": known, "links": reach})

    def seconds(self, flops: float, sent: float) -> float:
        """Time of so much work and traffic, not overlapped, of which no sizes are known: by the averages."""
        return flops / self.flops + sent / self.bytes

    @property
    def tick(self) -> float:
        """Seconds of a unit of work: by averages, of a FLOP, so that equal divisions of work are exactly equal."""
        return 1 / self.flops if self.kernels is None else TICK

    @property
    def gap(self) -> float:
        """Seconds that a small kernel takes, whatever it does."""
        return GAP if self.kernels is None else self.kernels.gap

    def work(self, node: fx.Node, target: Any, sources: Sequence[Placed], out: Results, mesh: Mesh) -> list[int]:
        """Ticks on every rank of a product or attention on values of these types and layouts; nothing for others."""
        flops = step_flops(node, target, sources, out, mesh)
        return flops if self.kernels is None or not flops else self._by_size(target, flops, sources, out)

    def node_work(self, node: fx.Node, mesh: Mesh | None) -> list[int]:
        """The same for a node of a graph with layouts; without a mesh of one device, as a single entry."""
        if not is_counted(node):
            return [0] * (mesh.world_size if mesh else 1)
        if self.kernels is None:
            return local_flops(node, mesh)
        placed = [_placed(source, mesh) for source in operands(node)]
        return self._by_size(node.target, local_flops(node, mesh), placed, _placed(node, mesh))

    def _by_size(self, target: Any, flops: list[int], sources: Sequence[Placed], out: Results) -> list[int]:
        assert self.kernels is not None
        spec, layout = map(first_of, out)
        if target in (*ops.ATTENTIONS, partial_attention):
            width = sources[0][0].shape[-1]
            seconds = [self.kernels.attention_seconds(each, width, spec.dtype) for each in flops]
        else:
            seconds = []
            for rank, each in enumerate(flops):
                made = math.prod(layout.local_shape(spec.shape, rank))
                moved = sum(one.on(where, rank).nbytes for one, where in sources) + made * spec.dtype.itemsize
                seconds.append(self.kernels.product_seconds(each, made, moved, spec.dtype))
        return [round(each / TICK) for each in seconds]

    def work_seconds(self, node: fx.Node, mesh: Mesh) -> tuple[float, ...]:
        """Time of an operator on every rank: of its FLOPs, or of writing its result."""
        pairs = zip(self.node_work(node, mesh), written_bytes(node, mesh), strict=True)
        return tuple(max(work * self.tick, self.writing(amount)) for work, amount in pairs)

    def writing(self, amount: float) -> float:
        """Seconds in which an operator that only does that writes so many bytes."""
        return amount / (self.memory if self.kernels is None else self.kernels.fused)

    def attention_seconds(self, flops: float, width: int, dtype: Any) -> float:
        """Time of an attention on one rank."""
        return flops / self.flops if self.kernels is None else self.kernels.attention_seconds(flops, width, dtype)

    def projection_seconds(self, flops: float, made: float, weights: float, dtype: Any) -> float:
        """Time of a product on one rank that reads so many bytes of weights, for so many elements of a result."""
        if self.kernels is None:
            return max(flops / self.flops, weights / self.memory)
        return self.kernels.product_seconds(flops, made, weights, dtype)

    def exchange_seconds(self, mesh: Mesh, traffic: Traffic) -> float:
        """Time of all these exchanges, one after the other, of the slowest rank of each."""
        if self.links is None:
            moved = sum(times * max(sent) for (_, sent), times in traffic.items())
            return self.latency * traffic.total() + self.seconds(0, moved)
        return sum(
            times * (self.start(mesh, dims) + self.sending(mesh, dims, sent)) for (dims, sent), times in traffic.items()
        )

    def start(self, mesh: Mesh, dims: Collection[str]) -> float:
        """Seconds before the first byte arrives along these mesh dims."""
        return self._start(_groups(mesh, dims))

    def sending(self, mesh: Mesh, dims: Collection[str], sent: Sequence[float]) -> float:
        """Seconds in which every rank sends so many bytes along these mesh dims, of the slowest rank, behind that."""
        return self._sending(_groups(mesh, dims), sent)

    def among(self, groups: Sequence[Sequence[int]], sent: Sequence[float]) -> float:
        """Seconds of an exchange in which every rank sends so many bytes, as many to each other of its group."""
        return self._start(groups) + self._sending(groups, sent) if any(sent) else 0.0

    def around(self, mesh: Mesh, dims: Collection[str], sent: Sequence[float]) -> float:
        """Seconds in which every rank passes so many bytes on around a ring along these mesh dims; what comes in a hop
        leaves in the next one."""
        hops, groups = mesh.size(dims) - 1, _groups(mesh, dims)
        speeds = [self.bytes if self.links is None else self.links.between(group).bytes for group in groups]
        return hops * self._start(groups) + max(amount / speed for amount, speed in zip(sent, speeds, strict=True))

    def joining(self, size: float) -> float:
        """Seconds in which partial results of an attention of so many bytes are joined, of the last hop of a ring, and
        in which its kernels begin anew."""
        return JOINED * size / self.memory if self.kernels is None else self.kernels.joining_seconds(size)

    def _start(self, groups: Sequence[Sequence[int]]) -> float:
        return self.latency if self.links is None else max(self.links.between(group).latency for group in groups)

    def _sending(self, groups: Sequence[Sequence[int]], sent: Sequence[float]) -> float:
        if self.links is None:
            return max(sent) / self.bytes
        each = zip(groups, sent, strict=True)
        return max(self.links.sending(rank, group, amount) for rank, (group, amount) in enumerate(each))

    def message_seconds(self, ends: tuple[int, int], sent: float) -> float:
        """Seconds of one message of so many bytes from a rank to another."""
        if self.links is None:
            return self.latency + sent / self.bytes
        link = self.links.between(ends)
        return link.latency + sent / link.bytes

    def relay(self, sent: float) -> float:
        """Seconds in which so many bytes get from one stage of a pipeline to the next, over the widest link."""
        return sent / (self.bytes if self.links is None else self.links.each[-1].bytes)


def _groups(mesh: Mesh, dims: Collection[str]) -> list[tuple[int, ...]]:
    """Of every rank, those that it talks to along these mesh dims, and itself."""
    return [mesh.group(rank, mesh.ordered(dims)) for rank in range(mesh.world_size)]


def _placed(node: fx.Node, mesh: Mesh | None) -> Any:
    """Types and layouts of a value, or of all that an operator gives; without a mesh of one device."""
    spec = node.meta[SPEC]
    return (spec, node.meta[LAYOUT]) if mesh is not None else (first_of(spec), Layout.whole(len(first_of(spec).shape)))


_AVERAGES = ("flops", "bytes", "memory", "latency", "upload")
SPEEDS: Mapping[str, float] = {name: getattr(Machine, name) for name in _AVERAGES}
H100 = Machine()


def program_work(program: Program, machine: Machine) -> int:
    """Ticks of all products and attentions of a program on one device."""
    found = all_graphs(program)
    return sum(times * machine.node_work(node, None)[0] for _, graph, times in found for node in graph.nodes)


def checked(machine: Machine) -> Machine:
    """The same; raises `ParallelizeError` for what is no machine."""
    if not isinstance(machine, Machine):
        raise ParallelizeError(f"machine={machine!r} is no xdit_ir.Machine, such as Machine(bytes=25e9)")
    return machine

"""Drafts: what propagation decides about one graph, before any of it is written down as a `torch.fx` graph.

Most partitions that are tried are dropped again, so that what they cost is asked of the draft.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import add_node, with_operands, write_relayout
from xdit_ir.ir.layout import Layout, key_gather_dims
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.rules.convolutions import space_of
from xdit_ir.rules.norms import divided_statistics
from xdit_ir.sharding.cost import relayout_dims, relayout_pieces, relayout_sent, step_flops
from xdit_ir.sharding.machine import Machine, Traffic

FALLBACK = "fallback"
Layouts = tuple[Layout, ...]


class LayoutNode:
    """A node to be: that of the source graph it comes from, the operator, its operands and layout.

    A change of layout comes from the node whose value it changes. `body` is what a block call calls: the block's
    name and the layouts that tell its variant.
    """

    __slots__ = ("body", "fallback", "layout", "node", "relayout", "sources", "target", "users")

    def __init__(
        self, node: fx.Node, target: Any, sources: list[LayoutNode], layout: Any, *, relayout: bool = False
    ) -> None:
        self.node, self.target, self.sources, self.layout, self.relayout = node, target, sources, layout, relayout
        self.fallback = ""
        self.body: Any = None
        self.users: dict[LayoutNode, None] = {}
        for source in sources:
            source.users[self] = None

    @property
    def spec(self) -> Any:
        """Type of the value."""
        return self.node.meta[SPEC]

    @property
    def is_operator(self) -> bool:
        """Whether a rule decides about it: no argument, parameter, change of layout, part of a result or block call."""
        plain = self.node.op == "call_function" and not self.relayout and self.body is None
        return plain and self.target is not operator.getitem

    @property
    def is_needed(self) -> bool:
        """Whether something uses it, or it belongs to the graph's interface."""
        return bool(self.users) or (self.node.op in ("placeholder", "output") and not self.relayout)

    def set_operands(self, sources: list[LayoutNode]) -> None:
        """Replace the operands."""
        self.detach()
        self.sources = sources
        for source in sources:
            source.users[self] = None

    def detach(self) -> None:
        """Use nothing any more."""
        for source in self.sources:
            source.users.pop(self, None)

    def common_shard(self) -> Layout | None:
        """The layout to which every user cuts the value, if they agree."""
        wanted = None
        for user in self.users:
            if user.target is not ops.shard or (wanted is not None and user.layout != wanted):
                return None
            wanted = user.layout
        return wanted


class LayoutGraph:
    """The steps of one graph in order; the last is its output, whose layouts are `outputs`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.steps: list[LayoutNode] = []
        self.outputs: Layouts = ()
        self._flops: list[int] | None = None
        self._work: dict[Machine, list[int]] = {}
        self._traffic: Traffic | None = None
        self._pieces: int | None = None

    def add(self, step: LayoutNode) -> LayoutNode:
        """Append a step."""
        self.steps.append(step)
        return step

    @property
    def calls(self) -> Iterator[LayoutNode]:
        """The block calls."""
        return (step for step in self.steps if step.body is not None)

    def sweep(self, push: Callable[[LayoutNode], list[LayoutNode]]) -> None:
        """Against the data flow: drop what nothing uses; `push` rewrites a step and says what to put before it."""
        backwards: list[LayoutNode] = []
        for step in reversed(self.steps):
            if not step.users and not step.is_needed:
                step.detach()
                continue
            before = push(step) if step.relayout or step.node.op == "call_function" else ()
            backwards += [step, *reversed(before)]
        self.steps = [step for step in reversed(backwards) if step.users or step.is_needed]

    def flops(self) -> list[int]:
        """FLOPs per rank, block calls aside."""
        if self._flops is None:
            total = [0] * self.mesh.world_size
            for step in self.steps:
                if step.is_operator:
                    sources = [(source.spec, source.layout) for source in step.sources]
                    counted = step_flops(step.node, step.target, sources, (step.spec, step.layout), self.mesh)
                    total = [a + b for a, b in zip(total, counted, strict=True)] if counted else total
            self._flops = total
        return self._flops

    def work(self, machine: Machine) -> list[int]:
        """Ticks of a machine per rank, block calls aside."""
        if machine.kernels is None:
            return self.flops()
        if machine not in self._work:
            total = [0] * self.mesh.world_size
            for step in filter(lambda step: step.is_operator, self.steps):
                sources = [(source.spec, source.layout) for source in step.sources]
                taken = machine.work(step.node, step.target, sources, (step.spec, step.layout), self.mesh)
                total = [a + b for a, b in zip(total, taken, strict=True)] if taken else total
            self._work[machine] = total
        return self._work[machine]

    def traffic(self) -> Traffic:
        """What ranks send each other in changes of layout, block calls aside. Attentions that pass their keys around a
        ring, beside the work, and norms whose statistics are divided count as exchanges of nothing."""
        if self._traffic is None:
            self._traffic = Counter(filter(None, map(self._exchanged, self.steps)))
        return self._traffic

    def _exchanged(self, step: LayoutNode) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        none = (0,) * self.mesh.world_size
        if step.relayout and step.target is not ops.shard:
            have, want = step.sources[0].layout, step.layout
            dims = relayout_dims(step.target, have, want, self.mesh)
            return dims, relayout_sent(step.target, step.spec, have, want, self.mesh)
        if step.target is ops.ring_attention:
            q, k, *_ = (source.layout for source in step.sources)
            return self.mesh.ordered(key_gather_dims(self.mesh, q, k)), none
        if divided := self._statistics(step):
            return self.mesh.ordered(divided), none
        return None

    def pieces(self) -> int:
        """Pieces that ranks put in their places one by one in changes of layout, block calls aside."""
        if self._pieces is None:
            changes = (step for step in self.steps if step.relayout and step.target not in (ops.shard, *ops.SUMS))
            each = ((step.spec.shape, step.sources[0].layout, step.layout) for step in changes)
            self._pieces = sum(relayout_pieces(self.mesh, *one) for one in each)
        return self._pieces

    def moved_bytes(self) -> int:
        """Bytes that the busiest rank of each sends in changes of layout."""
        return sum(times * max(sent) for (_, sent), times in self.traffic().items())

    def sums_up(self) -> bool:
        """Whether ranks hold summands that are added up: all of them, not those before a place."""
        reduced = (step.relayout and step.target in ops.SUMS for step in self.steps)
        norms = (step for step in self.steps if step.target is not torch.ops.aten.cumsum.default)
        return any(reduced) or any(map(self._statistics, norms))

    def divides_space(self) -> bool:
        """Whether windows of some convolution move along what is divided."""
        return any(map(self._divides_space, filter(lambda step: step.is_operator, self.steps)))

    def _divides_space(self, step: LayoutNode) -> bool:
        if len(step.sources) < 2:
            return False
        x, weight = step.sources[:2]
        if isinstance(x.layout, tuple) or isinstance(weight.layout, tuple):
            return False
        dims = space_of(step.target, len(x.layout.dims), weight.spec.shape)
        return any(x.layout.dims[dim] is not None for dim in dims)

    def _statistics(self, step: LayoutNode) -> frozenset[str]:
        """The mesh dims over which a norm, once it is lowered, adds up statistics."""
        if not step.is_operator or not step.sources:
            return frozenset()
        return divided_statistics(step.node, step.sources[0].layout, self.mesh)

    def attention_mesh_dims(self, part: str) -> frozenset[str]:
        """The mesh dims that divide the `queries`, the `keys` or the `batch` (and heads) of some attention."""
        found: frozenset[str] = frozenset()
        for step in self.steps:
            if step.target in ops.ATTENTIONS:
                dims = step.sources[1 if part == "keys" else 0].layout.dims
                found = found.union(*map(self.mesh.dividing_dims, dims[:-2] if part == "batch" else dims[-2:-1]))
        return found

    def key_gather_dims(self) -> frozenset[str]:
        """The mesh dims along which some attention finds only a part of its keys."""
        sources = (step.sources for step in self.steps if step.target in ops.ATTENTIONS)
        return frozenset().union(*(key_gather_dims(self.mesh, q.layout, k.layout) for q, k, *_ in sources))

    def write(self, name_of: Callable[[Any], str]) -> fx.Graph:
        """The graph; `name_of` names the variant of a block that a call calls."""
        graph = fx.Graph()
        written: dict[LayoutNode, fx.Node] = {}
        for step in self.steps:
            written[step] = _write(graph, step, [written[source] for source in step.sources], name_of)
        return graph


def _write(graph: fx.Graph, step: LayoutNode, sources: list[fx.Node], name_of: Callable[[Any], str]) -> fx.Node:
    node = step.node
    if step.relayout:
        return write_relayout(graph, sources[0], step.target, step.layout)
    args, kwargs = with_operands(node, sources)
    if step.body is not None:
        args = (name_of(step.body), *args[1:])
    target = step.target if node.op == "call_function" else node.target
    new = add_node(graph, node.op, target, args, kwargs, node.name)
    new.meta.update(node.meta)
    if node.op != "output":
        new.meta[LAYOUT] = step.layout
    if step.fallback:
        new.meta[FALLBACK] = step.fallback
    return new

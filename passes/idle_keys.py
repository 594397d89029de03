"""What makes rows of an input idle: masks hide their keys, and sums add nothing of them. Both are facts about values
that follow from inputs alone, which every call can check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import arguments_of, bound_arguments, operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Runs
from xdit_ir.ir.program import LAYOUT, SPEC, Program, call_parts, called_block, is_block_call
from xdit_ir.passes.input_cones import InputCones
from xdit_ir.passes.live_rows import IDLE, KEPT, idle_part, is_own, mixes_statistics

aten = torch.ops.aten
# A number as low as this, added to a score, leaves nothing of a key beside one that no less than `VISIBLE` is added to:
# a score that made up for it would be as large as the largest number that there is.
LOWEST, VISIBLE = torch.finfo(torch.float32).min / 2, -1e30
# What gives zero where its first operand is zero.
_KEEP_ZERO = (
    *(aten._to_copy, aten.to, aten.clone, aten.neg, aten.reshape, aten.view, aten._unsafe_view, aten.unsqueeze),
    *(aten.squeeze, aten.permute, aten.transpose, aten.expand, aten.slice, aten.sum, aten.mean, aten.div),
)


class NotIdle(Exception):
    """Something needs the rows that are to be left out."""


@dataclass(frozen=True)
class IdlePlaces:
    """Places of the dim `dim` at which `value` (of the graph of `InputCones`) is zero or, of a mask (`hides`), hides
    keys from all queries, or from those at the places `queries`."""

    value: fx.Node
    dim: int
    places: Runs
    hides: bool = False
    queries: Runs | None = None

    def each(self, cones: InputCones) -> fx.Node:
        """For each place whether it is so, a boolean `[places]`."""
        seen, shape = self.value, self.value.meta[SPEC].shape
        if self.queries is not None:
            seen = cones.add(ops.take, seen, len(shape) - 2, self.queries)
        there = _by_place(cones, cones.add(ops.take, seen, self.dim, self.places), self.dim)
        if not self.hides or there.meta[SPEC].dtype == torch.bool:
            return cones.add(aten.logical_not.default, cones.add(aten.any.dim, there, 1))
        hidden = cones.add(aten.le.Scalar, cones.add(aten.amax.default, there, [1]), LOWEST)
        return cones.add(aten.logical_and.default, hidden, self._others_show(cones, seen))

    def _others_show(self, cones: InputCones, seen: fx.Node) -> fx.Node:
        """Whether each query sees some key, or all that is hidden from it is so by -inf."""
        most = cones.add(aten.amax.default, seen, [-1])
        shown, none = cones.add(aten.ge.Scalar, most, VISIBLE), cones.add(aten.eq.Scalar, most, -torch.inf)
        return cones.add(aten.all.default, cones.add(aten.logical_or.default, shown, none))


def _by_place(cones: InputCones, value: fx.Node, dim: int) -> fx.Node:
    """`[..., places, ...]` as `[places, others]`."""
    shape = value.meta[SPEC].shape
    order = [dim, *(d for d in range(len(shape)) if d != dim)]
    first = cones.add(aten.permute.default, value, order)
    return cones.add(aten.reshape.default, first, [shape[dim], -1])


def idle_places(program: Program, divided: Program, cones: InputCones) -> list[IdlePlaces]:
    """What must be so for the first rank of `divided`, made of `program`, to need nothing of the other one.

    Raises:
        NotIdle: it does need something, whatever inputs hold.
    """
    demands = {name: list(_demands(block.graph)) for name, block in divided.blocks.items()}
    found = {one: None for node in _demands(divided.graph) for one in _Reader(program, cones).met(node)}
    for call, own in zip(divided.calls, program.calls, strict=True):
        reader = _Reader(program, cones, call, own, divided)
        found |= {one: None for node in demands[called_block(call)] for one in reader.met(node)}
    return list(found)


def _demands(graph: fx.Graph) -> Iterator[fx.Node]:
    """Sums over ranks, and attentions that find a part of the keys: what may leave out what is idle."""
    for node in graph.nodes:
        if node.op != "call_function" or is_block_call(node):
            continue
        if ops.is_relayout(node.target):
            if not is_own(node):
                raise NotIdle(f"{node.name} needs rows that are idle")
            if operands(node)[0].meta[LAYOUT].partial:
                yield node
        elif node.target in ops.ATTENTIONS:
            if idle_part(operands(node)[1].meta[LAYOUT].dims[-2]).size and not _comes_before(node):
                yield node
        elif mixes_statistics(node):
            raise NotIdle(f"{node.name} takes statistics of rows that are idle")


def _comes_before(attention: fx.Node) -> bool:
    """Whether causality hides from all queries that are kept what is left out."""
    if not bound_arguments(attention)["is_causal"]:
        return False
    q, k = (value.meta[LAYOUT].dims[-2] for value in operands(attention)[:2])
    if q is None or q.parts[KEPT] != k.parts[KEPT] or not q.parts[KEPT].is_whole(q.parts[KEPT].size):
        raise NotIdle(f"{attention.name} is causal, and what is idle does not come last")
    return True


@dataclass(frozen=True)
class _Reader:
    """Reads a graph of a divided program: the outer one, or the body that `call` calls, which is `own` in `program`."""

    program: Program
    cones: InputCones
    call: fx.Node | None = None
    own: fx.Node | None = None
    divided: Program | None = None

    def met(self, node: fx.Node) -> list[IdlePlaces]:
        """What must be so for a sum, or an attention, to leave out what is idle."""
        return self._zero(operands(node)[0]) if ops.is_relayout(node.target) else [self._hidden(node)]

    def _hidden(self, attention: fx.Node) -> IdlePlaces:
        q, k, *others = operands(attention)
        keys, queries = k.meta[LAYOUT].dims[-2], q.meta[LAYOUT].dims[-2]
        mask = others[1] if len(others) > 1 else None
        if mask is None or (shape := mask.meta[SPEC].shape)[-1] != keys.size:
            raise NotIdle(f"{attention.name} sees all keys")
        value = self._cone(mask)
        if value is None:
            raise NotIdle(f"{attention.name} has a mask that does not follow from inputs alone")
        rows = len(shape) > 1 and queries is not None and shape[-2] == queries.size
        seeing = queries.parts[KEPT].runs if rows else None
        return IdlePlaces(value, len(shape) - 1, idle_part(keys).runs, True, seeing)

    def _zero(self, node: fx.Node) -> list[IdlePlaces]:
        """What must be so for the other rank's part of a value to be zero."""
        layout = node.meta[LAYOUT]
        if not isinstance(layout, Layout):
            raise NotIdle(f"{node.name} sums up rows that are idle")
        parts = {dim: one for dim, one in enumerate(layout.dims) if one is not None}
        if any(not one.parts[IDLE].size for one in parts.values()):
            return []
        packet, sources = getattr(node.target, "overloadpacket", None), operands(node)
        if packet is aten.mul:
            return self._first_zero(sources)
        if parts and not layout.partial and (value := self._cone(node)) is not None:
            [(dim, part)] = parts.items()
            return [IdlePlaces(value, dim, part.parts[IDLE].runs)]
        if node.op == "placeholder" and self.call is not None:
            return self._outside(node)
        if packet in _KEEP_ZERO or node.target is ops.shard:
            return self._zero(sources[0])
        raise NotIdle(f"{node.name} sums up rows that are idle")

    def _first_zero(self, factors: list[fx.Node]) -> list[IdlePlaces]:
        refusal: NotIdle | None = None
        for factor in factors:
            try:
                return self._zero(factor)
            except NotIdle as error:
                refusal = error
        raise refusal or NotIdle("a product of nothing")

    def _outside(self, argument: fx.Node) -> list[IdlePlaces]:
        assert self.call is not None and self.divided is not None
        body: Any = argument.graph
        value = call_parts(self.call).values[arguments_of(body).index(argument)]
        return _Reader(self.program, self.cones)._zero(value)

    def _cone(self, node: fx.Node) -> fx.Node | None:
        """The value before it was divided, if it follows from inputs alone."""
        while ops.is_relayout(node.target):
            [node] = operands(node)
        graph = self.program.graph if self.own is None else self.program.blocks[called_block(self.own)].graph
        found = next((one for one in graph.nodes if one.name == node.name), None)
        return None if found is None else self.cones.find(found, self.own)

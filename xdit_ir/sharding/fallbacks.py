"""Operators that needed a divided dimension whole, wherever it was gathered for them.

A pass may gather a value long before the operator that needs it: before a block, or once for all its calls. So each
gathered value is followed as if it had stayed divided, through the operators whose rules accept that, to those that do
not. No fallbacks are keys of attentions, conditions that are broadcast to a stream (divided or not), and what is only
put in place, to be divided again or as an output of the model; the one largest or smallest element, for which a number
a row is gathered; nor is an operator whose work is divided by another dim instead (a projection of which each rank
makes some features).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs, operands, placeholders, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.printer import target_name
from xdit_ir.ir.program import BYTES_IN_FULL, LAYOUT, SPEC, Program, called_block, is_block_call, is_weight, where_of
from xdit_ir.ir.relayout import kind
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, as_layouts, dividing_dims_of
from xdit_ir.rules.pointwise import is_pointwise
from xdit_ir.rules.reductions import is_extreme
from xdit_ir.sharding.cost import local_flops, relayout_bytes
from xdit_ir.sharding.gathered_weights import gathers_weights
from xdit_ir.sharding.layout_graph import FALLBACK
from xdit_ir.sharding.shared_out import is_shared_out

aten = torch.ops.aten
# Where queries meet keys, which are gathered as is best.
_MEETINGS = (*ops.ATTENTIONS, partial_attention)
UNDIVIDED = "no stream of tokens can be divided: along ulysses and ring every rank computes the same"
# Operators beside views that only put elements elsewhere.
_MOVES = {
    aten.cat,
    aten.stack,
    aten.constant_pad_nd,
    aten.pad,
    aten.index,
    aten.index_select,
    aten.slice_scatter,
    aten.flip,
    aten.roll,
    aten.pixel_shuffle,
    aten.pixel_unshuffle,
    ops.put,
}


@dataclass(frozen=True)
class Fallback:
    """An operator whose operand had to be gathered: where, why, what that sends from the busiest rank, and the FLOPs
    that every rank does between that gather and where the value is divided again, or the end."""

    op: str
    place: str
    reason: str
    bytes: int
    repeated: int = 0


@dataclass(frozen=True)
class _Value:
    """A value if nothing had been gathered: its layout, the gathers left out, and the fallbacks that it is behind."""

    layout: Layout
    gathers: frozenset[fx.Node] = frozenset()
    behind: frozenset[fx.Node] = frozenset()


_Values = tuple[_Value, ...]


def find_gathers(program: Program) -> Iterator[str]:
    """Every gather inside a block, whatever it is for: the operators that need it, and where."""
    for name, block in program.blocks.items():
        for node in block.graph.nodes:
            if node.target is ops.gather:
                names = (user.op if user.op == "output" else target_name(user.target) for user in node.users)
                yield f"{', '.join(dict.fromkeys(names))}: {place_of(name, node)}"


def place_of(graph: str, node: fx.Node) -> str:
    """Where a node stands: its block (empty: the outer graph), module, name and source line."""
    where = where_of(node)
    return " ".join(part for part in (graph, where.module, node.name, where.source) if part)


def find_fallbacks(program: Program, mesh: Mesh) -> Iterator[Fallback]:
    """Operators for which something had to be gathered; or all of them, where nothing is divided."""
    graphs = list(all_graphs(program))
    nodes = [(name, node) for name, graph, _ in graphs for node in graph.nodes]
    if mesh.size(SEQUENCE) > 1 and not any(dividing_dims_of(node, mesh) & {*SEQUENCE} for _, node in nodes):
        yield Fallback("forward", "the whole model", UNDIVIDED, 0)
    walk, computed = _Walk(program, mesh), _computed(program)
    times = {name: count for name, _, count in graphs}
    homes = {node: name for name, node in nodes if node.target is ops.gather and not _is_kept(node)}
    chosen = _chosen([gather for gather, name in homes.items() if name and gather in computed - walk.needed])
    for name, node in nodes:
        reason, gathers = node.meta.get(FALLBACK, ""), walk.needs.get(node) or chosen.get(node, frozenset())
        if reason:
            gathers = gathers or frozenset(one for one in operands(node) if one in homes)
        if not reason and (not gathers or (_moves(node) and node not in computed)):
            continue
        reason = reason or ("what follows is not divided" if node in chosen else "needs the dimension whole")
        hoisted = "; gathered before the block" if name and any(not homes[gather] for gather in gathers) else ""
        sent = sum(times[homes[gather]] * max(relayout_bytes(gather, mesh)) for gather in gathers)
        repeated = sum(walk.repeated[cause] for cause in {node, *gathers})
        reason += hoisted if name else "; outside of blocks"
        yield Fallback(target_name(node.target), place_of(name, node), reason, sent, repeated)


def _chosen(gathers: Sequence[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """The operators that get gathered what they would take divided; conditions aside, and keys of attentions."""
    users = [(user, gather) for gather in gathers for user in gather.users if user.target not in _MEETINGS]
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for user, gather in users:
        skipped = ops.is_relayout(user.target) or is_extreme(user)
        if not skipped and not _is_broadcast(gather, user):
            found[user] = found.get(user, frozenset()) | {gather}
    return found


class _Walk:
    """One forward walk: `needs[operator]` are the gathers that it cannot do without, `repeated[cause]` the FLOPs of a
    rank behind a gather, or behind an operator that needs one, which are not divided over the mesh dims gathered."""

    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.program, self.mesh = program, mesh
        self.needs: dict[fx.Node, frozenset[fx.Node]] = {}
        self.repeated: Counter[fx.Node] = Counter()
        self.called: dict[tuple[str, _Values], tuple[_Values, Counter[fx.Node]]] = {}
        inputs = [_Value(node.meta[LAYOUT]) for node in placeholders(program.graph)]
        self._graph(program.graph, inputs, self.repeated)

    def _graph(self, graph: fx.Graph, inputs: Sequence[_Value], repeated: Counter[fx.Node]) -> _Values:
        """The values that a graph returns for these arguments."""
        env: dict[fx.Node, _Values] = {}
        feed = iter(inputs)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = (next(feed),)
            elif node.op == "get_attr":
                env[node] = _as_it_is(node)
            elif node.op == "call_function":
                sources = [env[source] for source in operands(node)]
                if node.target is operator.getitem:
                    env[node] = (sources[0][node.args[1]],)
                elif is_block_call(node):
                    env[node] = self._call(node, tuple(source for (source,) in sources), repeated)
                else:
                    env[node] = self._operator(node, [source for (source,) in sources], repeated)
        return tuple(env[value][0] for value in results_of(graph))

    def _call(self, node: fx.Node, sources: _Values, repeated: Counter[fx.Node]) -> _Values:
        key = (called_block(node), sources)
        if key not in self.called:
            found: Counter[fx.Node] = Counter()
            self.called[key] = self._graph(self.program.blocks[key[0]].graph, sources, found), found
        results, found = self.called[key]
        repeated.update(found)
        return results

    def _operator(self, node: fx.Node, sources: list[_Value], repeated: Counter[fx.Node]) -> _Values:
        """The value or values of a change of layout or an operator; notes what it needs and what it costs."""
        gathers = frozenset[fx.Node]().union(*(source.gathers for source in sources))
        behind = frozenset[fx.Node]().union(*(source.behind for source in sources))
        if node.target is ops.gather and not self._is_meant(node):
            return (replace(sources[0], gathers=gathers | {node}),)
        if not gathers and not behind:
            return _as_it_is(node)
        if ops.is_relayout(node.target):
            divided = node.target is not ops.all_reduce
            found = _as_it_is(node) if divided else (replace(sources[0], layout=sources[0].layout.summed()),)
        else:
            found = self._inferred(node, sources) if gathers else _as_it_is(node)
        here = dividing_dims_of(node, self.mesh)
        behind = frozenset(need for need in behind | ({node} & self.needs.keys()) if not self._dims(need) & here)
        for cause in behind | frozenset(gather for gather in gathers if not _dims_of(gather, self.mesh) & here):
            repeated[cause] += max(local_flops(node, self.mesh))
        return tuple(replace(value, behind=behind) for value in found)

    def _is_meant(self, gather: fx.Node) -> bool:
        """Whether a value is divided only to be gathered: a weight, also one from the host, what is shared out, or keys
        in fewer bits."""
        divided = operands(gather)[0]
        return _is_kept(gather) or is_weight(divided) or gathers_weights(gather) or is_shared_out(divided, self.mesh)

    def _inferred(self, node: fx.Node, sources: list[_Value]) -> _Values:
        """What the rules make of operands of which some stayed divided."""
        if node.target in _MEETINGS:  # keys may always be gathered; the result follows the queries
            others = [_Value(operand.meta[LAYOUT]) for operand in operands(node)[1:]]
            sources = [sources[0], *others]
        ruling = infer(OpCall(node, self.mesh, tuple(source.layout for source in sources)))
        gathers = frozenset[fx.Node]().union(*(source.gathers for source in sources))
        refused = [
            (operand, source.gathers or gathers)
            for operand, source, want in zip(operands(node), sources, ruling.inputs, strict=True)
            if kind(self.mesh, source.layout.summed(), want.summed())[0] == "gather"
        ]
        if not refused:
            return tuple(_Value(layout, gathers) for layout in as_layouts(ruling.outputs))
        needed = [found for operand, found in refused if not _is_broadcast(operand, node)]
        together = frozenset[fx.Node]().union(*needed)
        along = frozenset[str]().union(*(_dims_of(gather, self.mesh) for gather in together))
        shared = along <= dividing_dims_of(node, self.mesh)  # its work is divided by another dim instead
        if together and not shared and node.target not in _MEETINGS and not is_extreme(node):
            self.needs[node] = self.needs.get(node, frozenset()) | together
        return _as_it_is(node)

    @property
    def needed(self) -> frozenset[fx.Node]:
        """The gathers that some operator cannot do without."""
        return frozenset[fx.Node]().union(*self.needs.values())

    def _dims(self, need: fx.Node) -> frozenset[str]:
        return frozenset[str]().union(*(_dims_of(gather, self.mesh) for gather in self.needs[need]))


def _is_kept(gather: fx.Node) -> bool:
    """Whether it is of keys or values that wait for other patches in fewer bits (`cast-kv-cache`)."""
    return BYTES_IN_FULL in operands(gather)[0].meta


def _as_it_is(node: fx.Node) -> _Values:
    return tuple(map(_Value, as_layouts(node.meta[LAYOUT])))


def _dims_of(gather: fx.Node, mesh: Mesh) -> frozenset[str]:
    """The mesh dims along which a gather brings parts together."""
    return dividing_dims_of(operands(gather)[0], mesh) - dividing_dims_of(gather, mesh)


def _is_broadcast(operand: fx.Node, node: fx.Node) -> bool:
    """Whether an operator applies a smaller operand to all of another one, by which its result is divided or not."""
    return is_pointwise(node.target) and operand.meta[SPEC].nbytes < node.meta[SPEC].nbytes


def _moves(node: fx.Node) -> bool:
    """Whether a node puts elements elsewhere or changes them one by one."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    alone = packet is aten.einsum and len(operands(node)) == 1
    permutes = alone and operands(node)[0].meta[SPEC].nbytes == node.meta[SPEC].nbytes
    return packet in _MOVES or permutes or ops.is_relayout(target) or ops.is_view(target) or is_pointwise(target)


def _computed(program: Program) -> set[fx.Node]:
    """Values with which something is computed before they are divided again, or outputs: more than moves."""
    found: set[fx.Node] = set()
    seen: set[tuple[str, tuple[bool, ...]]] = set()

    def visit(graph: fx.Graph, results: Sequence[bool]) -> None:
        found.update(value for value, used in zip(results_of(graph), results, strict=True) if used)
        for node in reversed(graph.nodes):
            if node.op != "call_function":
                continue
            if not is_block_call(node):
                if (node in found or not _moves(node)) and node.target is not ops.shard:
                    found.update(operands(node))
                continue
            block = program.blocks[called_block(node)].graph
            used = {user.args[1] for user in node.users if user in found}
            key = (called_block(node), tuple(place in used for place in range(len(results_of(block)))))
            if key not in seen:
                seen.add(key)
                visit(block, key[1])
            pairs = zip(operands(node), placeholders(block), strict=True)
            found.update(value for value, inner in pairs if inner in found)

    visit(program.graph, [False] * len(results_of(program.graph)))
    return found

"""`divide-conditions`: projections of what conditions all tokens are made before the blocks, each rank its features."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_graph, operands, remove_dead, results_of
from xdit_ir.ir.layout import Layout, kind
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Block, Program, TensorSpec, call_block, call_parts, is_block_call
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall
from xdit_ir.sharding.cost import Machine, local_flops

aten = torch.ops.aten
Projections = Mapping[str, list[fx.Node]]


@dataclass(frozen=True)
class DivideConditions:
    """Modulations and the like: every block projects the same few rows (of the timestep's embedding, say), so the time
    is that of reading its weights, on every rank. Where it pays, these projections of all blocks are made before the
    first one, each rank reads the weights of its part of the features, and all parts are exchanged at once.
    Numerics: exact.
    """

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)
    name: str = "divide-conditions"

    def apply(self, program: Program) -> Program:
        """The program with these projections taken out of its blocks and divided over all ranks."""
        early = _early(program)
        projections = {name: self._projections(block, early.get(name, [])) for name, block in program.blocks.items()}
        projections = {name: found for name, found in projections.items() if found}
        calls = [call for call in program.calls if call_parts(call)[0] in projections]
        if not calls or self._saved(projections, calls) <= 0:
            return program
        return _Rewrite(program, self.mesh, projections).program()

    def _projections(self, block: Block, early: list[int]) -> list[fx.Node]:
        """Linear operators of a body that depend on nothing but early arguments and weights, and wait for weights."""
        inputs = [node for node in block.graph.nodes if node.op == "placeholder"]
        known = {inputs[place] for place in early}
        found = []
        for node in block.graph.nodes:
            local = node.op == "call_function" and not ops.is_relayout(node.target)
            if node.op == "get_attr" or (local and all(source in known for source in operands(node))):
                known.add(node)
                if node.op == "call_function" and self._waits_for_weights(node):
                    found.append(node)
        before = _ancestors(source for node in found for source in operands(node))
        return [node for node in found if node not in before]

    def _waits_for_weights(self, node: fx.Node) -> bool:
        if node.target is not aten.linear.default or any(w.op != "get_attr" for w in operands(node)[1:]):
            return False
        if operands(node)[0].op == "get_attr" or node.meta[SPEC].shape[-1] < self.mesh.world_size:
            return False
        return self._gain(node) > 0

    def _gain(self, node: fx.Node) -> float:
        """Seconds saved by one projection if all ranks share it, its part of the exchange included."""
        weights: int = sum(weight.meta[SPEC].nbytes for weight in operands(node)[1:])
        flops, whole = max(local_flops(node, self.mesh)), max(local_flops(node, None))
        count, out = self.mesh.world_size, node.meta[SPEC].nbytes
        now = max(flops / self.machine.flops, weights / self.machine.memory)
        then = max(whole / count / self.machine.flops, weights / count / self.machine.memory)
        return now - then - self.machine.seconds(0, out / count)

    def _saved(self, projections: Projections, calls: list[fx.Node]) -> float:
        """Seconds, after one exchange of all results and one of each condition."""
        total = sum(self._gain(node) for call in calls for node in projections[call_parts(call)[0]])
        return total - 2 * self.machine.latency


def _early(program: Program) -> dict[str, list[int]]:
    """Per block the places of arguments that come out of no block, in any of its calls."""
    late = _late(program.graph)
    places: dict[str, set[int]] = {}
    for call in program.calls:
        name, _, values = call_parts(call)
        early = {place for place, value in enumerate(values) if value not in late}
        places[name] = places.get(name, early) & early
    return {name: sorted(found) for name, found in places.items()}


def _late(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a block."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if is_block_call(node) or node.op == "output" or any(source in late for source in operands(node)):
            late.add(node)
    return late


class _Rewrite:
    """Builds the new program: its prologue, the projections of all calls, one exchange, then the rest."""

    def __init__(self, program: Program, mesh: Mesh, projections: Projections) -> None:
        self.before, self.mesh, self.projections = program, mesh, projections
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.made: dict[fx.Node, list[fx.Node]] = {}
        self.rest: dict[str, Block] = {}
        self.kept: dict[str, list[int]] = {}

    def program(self) -> Program:
        """The program after the rewrite."""
        late = _late(self.before.graph)
        for node in self.before.graph.nodes:
            if node not in late:
                self._copy(node)
        conditions = {name: self._conditions(name) for name in self.projections}
        calls = [call for call in self.before.calls if call_parts(call)[0] in self.projections]
        made = {call: self._project(call, *conditions[call_parts(call)[0]]) for call in calls}
        self._exchange(made)
        self.rest = {name: self._rest(block) for name, block in self.before.blocks.items()}
        for node in self.before.graph.nodes:
            if node in late:
                self._copy(node)
        blocks = self.rest | {block.name: block for block, _ in conditions.values()}
        return self.before.replace(graph=self.graph, blocks=blocks)

    def _copy(self, node: fx.Node) -> None:
        self.env[node] = new = self.graph.node_copy(node, self.env.__getitem__)
        new.meta = dict(node.meta)
        if node in self.made:
            name, prefix, values = call_parts(new)
            new.args = (name, prefix, [*(values[place] for place in self.kept[name]), *self.made[node]])

    def _conditions(self, name: str) -> tuple[Block, list[int]]:
        """A body that makes a rank's features of a block's projections, and which arguments of the block it takes."""
        wanted = self.projections[name]
        needed = _ancestors(wanted)
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        inputs = [node for node in self.before.blocks[name].graph.nodes if node.op == "placeholder"]
        for node in self.before.blocks[name].graph.nodes:
            if node in wanted:
                env[node] = self._divided(graph, node, env)
            elif node in needed:
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = dict(node.meta)
                _give_layout(env[node], self.mesh)
        graph.output(tuple(env[node] for node in wanted))
        return Block(f"{name}_conditions", graph), [place for place, node in enumerate(inputs) if node in needed]

    def _divided(self, graph: fx.Graph, node: fx.Node, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A projection to this rank's part of the features."""
        features = self.mesh.divide(node.meta[SPEC].shape[-1], MESH_DIMS)
        source, *weights = operands(node)
        parts = []
        for weight in weights:
            part = graph.call_function(ops.shard, (env[weight],))
            part.meta = {**weight.meta, LAYOUT: weight.meta[LAYOUT].with_dims({0: features})}
            parts.append(part)
        new = graph.create_node("call_function", node.target, (env[source], *parts), name=node.name)
        new.meta = dict(node.meta)
        _give_layout(new, self.mesh)
        return new

    def _project(self, call: fx.Node, block: Block, places: Iterable[int]) -> list[fx.Node]:
        """The call of such a body for one block call."""
        _, prefix, values = call_parts(call)
        given = [self._gathered(self.env[values[place]]) for place in places]
        new = self.graph.call_function(call_block, (block.name, prefix, given))
        results = results_of(block.graph)
        new.meta = {
            **call.meta,
            SPEC: tuple(r.meta[SPEC] for r in results),
            LAYOUT: tuple(r.meta[LAYOUT] for r in results),
        }
        picked = []
        for index, result in enumerate(results):
            one = self.graph.call_function(operator.getitem, (new, index))
            one.meta = {**call.meta, SPEC: result.meta[SPEC], LAYOUT: result.meta[LAYOUT]}
            picked.append(one)
        return picked

    def _gathered(self, value: fx.Node) -> fx.Node:
        """A condition, whole on every rank."""
        if value not in self.whole:
            whole = Layout.whole(len(value.meta[SPEC].shape))
            self.whole[value] = _relaid(self.graph, value, whole, self.mesh)
        return self.whole[value]

    def _exchange(self, made: Mapping[fx.Node, list[fx.Node]]) -> None:
        """Exchange results that differ in their features only as one value, and cut it again."""
        places = [(call, place) for call, results in made.items() for place in range(len(results))]
        wanted = {at: self.projections[call_parts(at[0])[0]][at[1]].meta for at in places}
        alike: dict[object, list[tuple[fx.Node, int]]] = {}
        for at in places:
            spec, layout = wanted[at][SPEC], wanted[at][LAYOUT]
            alike.setdefault((spec.shape[:-1], spec.dtype, layout.dims[:-1]), []).append(at)
        cuts: dict[tuple[fx.Node, int], fx.Node] = {}
        for group in alike.values():
            parts = [made[call][place] for call, place in group]
            joined = self._joined(parts)
            whole = _relaid(self.graph, joined, wanted[group[0]][LAYOUT], self.mesh)
            cuts |= zip(group, self._cut(whole, [part.meta[SPEC] for part in parts]), strict=True)
        self.made = {call: [cuts[call, place] for place in range(len(results))] for call, results in made.items()}

    def _joined(self, parts: list[fx.Node]) -> fx.Node:
        first = parts[0].meta[SPEC]
        new = self.graph.create_node("call_function", aten.cat.default, (parts, -1), name="conditions")
        features = sum(part.meta[SPEC].shape[-1] for part in parts)
        new.meta = {**parts[0].meta, SPEC: replace(first, shape=(*first.shape[:-1], features))}
        _give_layout(new, self.mesh)
        return new

    def _cut(self, whole: fx.Node, specs: list[TensorSpec]) -> Iterator[fx.Node]:
        start = 0
        for spec in specs:
            stop = start + spec.shape[-1]
            one = self.graph.call_function(aten.slice.Tensor, (whole, len(spec.shape) - 1, start, stop))
            one.meta = {**whole.meta, SPEC: spec}
            _give_layout(one, self.mesh)
            yield one
            start = stop

    def _rest(self, block: Block) -> Block:
        """A block that is given its projections, and no condition that only they needed."""
        if block.name not in self.projections:
            return block
        graph = copy_graph(block.graph)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        last = inputs[-1]
        for name in [node.name for node in self.projections[block.name]]:
            [node] = (node for node in graph.nodes if node.name == name)
            with graph.inserting_after(last):
                last = graph.create_node("placeholder", f"{name}_made", name=f"{name}_made")
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
        remove_dead(graph)
        self.kept[block.name] = [place for place, node in enumerate(inputs) if node.users]
        for node in inputs:
            if not node.users:
                graph.erase_node(node)
        return replace(block, graph=graph)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo = set[fx.Node](), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += operands(node)
    return found


def _give_layout(node: fx.Node, mesh: Mesh) -> None:
    """The layout that the rules infer; arguments and weights are whole."""
    if node.op != "call_function":
        node.meta[LAYOUT] = Layout.whole(len(node.meta[SPEC].shape))
    elif node.target is operator.getitem:
        node.meta[LAYOUT] = operands(node)[0].meta[LAYOUT][node.args[1]]
    else:
        node.meta[LAYOUT] = infer(OpCall(node, mesh, tuple(s.meta[LAYOUT] for s in operands(node)))).outputs


def _relaid(graph: fx.Graph, value: fx.Node, wanted: Layout, mesh: Mesh) -> fx.Node:
    """A value in another layout."""
    if value.meta[LAYOUT] == wanted:
        return value
    change = kind(mesh, value.meta[LAYOUT], wanted)[0]
    new = graph.create_node("call_function", ops.RELAYOUTS[change], (value,), name=f"{value.name}_{change}")
    new.meta = {**value.meta, LAYOUT: wanted}
    return new

"""All patches of a stage as one program: a synchronous step, in which reads wait for the writes of all patches."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir.buffer_ops import Keep, Read, Recall, Write
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.program import WEIGHT, Block, Program, call_block, call_parts, is_block_call


def interleave(programs: Sequence[Program], received: Collection[str]) -> Program:
    """One program for the programs of a stage's patches, in which they go on in turns, each as far as it can.

    Inputs are the model's, then those called `received` of the first patch, then those of the second, and so on, see
    `of_patch`; outputs those of the first patch, then those of the second, and so on.

    Raises:
        VerifyError: the patches wait for each other for ever.
    """
    if len(programs) == 1:
        return programs[0]
    weaver = _Weaver([program.graph for program in programs], programs)
    graph = weaver.run(received)
    return programs[0].replace(graph=graph, blocks=weaver.blocks)


def of_patch(name: str, patch: int) -> str:
    """The name of an input that each patch has for itself."""
    return f"{name}_of_{patch}"


@dataclass(eq=False)
class _Thread:
    """One patch's graph and how far it has come."""

    nodes: list[fx.Node]
    calls: Collection[str]
    writes: Collection[str]
    at: int = 0
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    first: dict[fx.Node, int] = field(default_factory=dict)

    @property
    def next(self) -> fx.Node:
        return self.nodes[self.at]

    @staticmethod
    def of(graph: fx.Graph) -> _Thread:
        nodes = list(graph.nodes)
        calls = {node.name for node in nodes if is_block_call(node)}
        return _Thread(nodes, calls, {node.target.slot for node in nodes if isinstance(node.target, Write)})


class _Weaver:
    """Writes the graphs of several patches into one."""

    def __init__(self, graphs: Sequence[fx.Graph], programs: Sequence[Program]) -> None:
        self.threads = [_Thread.of(graph) for graph in graphs]
        self.programs = programs
        self.graph = fx.Graph()
        self.blocks: dict[str, Block] = {}
        self.written: list[set[str]] = [set() for _ in graphs]
        self.kept: dict[str, fx.Node] = {}
        self.state: dict[str, fx.Node] = {}

    def run(self, own: Collection[str] | None = None) -> fx.Graph:
        """The graph of all; each patch has inputs called `own` (None: all) for itself."""
        self._inputs(own)
        while any(thread.next.op != "output" for thread in self.threads):
            if not sum([self._advance(patch) for patch in range(len(self.threads))]) and not self._call():
                stuck = ", ".join(f"patch {p} at {thread.next.name}" for p, thread in enumerate(self.threads))
                raise VerifyError(f"the patches of a synchronous step wait for each other for ever: {stuck}")
        results = [thread.env[value] for thread in self.threads for value in operands(thread.next)]
        self.graph.output(tuple(results))
        return self.graph

    def _inputs(self, own: Collection[str] | None) -> None:
        """Those of every patch, then the weights, which all patches share."""
        known: dict[str, fx.Node] = {}
        given = [
            (p, node) for p, thread in enumerate(self.threads) for node in thread.nodes if node.op == "placeholder"
        ]
        for patch, node in sorted(given, key=lambda one: WEIGHT in one[1].meta):
            alone = WEIGHT not in node.meta and (own is None or node.name in own)
            name = of_patch(node.name, patch) if alone else node.name
            if name not in known:
                known[name] = self._noted(node, self.graph.create_node("placeholder", name, name=name))
            self.threads[patch].env[node] = known[name]

    def _advance(self, patch: int) -> int:
        """Go on until something must be waited for; how many nodes that were."""
        thread, start = self.threads[patch], self.threads[patch].at
        while (node := thread.next).op != "output" and self._is_ready(node):
            thread.env[node] = self._node(node, patch)
            thread.at += 1
        return thread.at - start

    def _is_ready(self, node: fx.Node) -> bool:
        if isinstance(node.target, Read):
            slot = node.target.slot
            return all(slot in done for t, done in zip(self.threads, self.written, strict=True) if slot in t.writes)
        if isinstance(node.target, Recall):
            return node.target.slot in self.kept
        return not is_block_call(node)

    def _node(self, node: fx.Node, patch: int) -> fx.Node:
        thread = self.threads[patch]
        if node.op == "placeholder":
            return thread.env[node]
        if node.op == "get_attr":
            name = str(node.target)
            if name not in self.state:
                self.state[name] = self.graph.node_copy(node, thread.env.__getitem__)
            return self.state[name]
        if isinstance(node.target, Recall):
            return self.kept[node.target.slot]
        if isinstance(node.target, Keep):
            self.kept[node.target.slot] = thread.env[operands(node)[0]]
            return self.kept[node.target.slot]
        if isinstance(node.target, Write):
            self.written[patch].add(node.target.slot)
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and source in thread.first:
            assert isinstance(source, fx.Node) and isinstance(node.args[1], int)
            place = thread.first[source] + node.args[1]
            return self._noted(node, self.graph.call_function(operator.getitem, (thread.env[source], place)))
        return self.graph.node_copy(node, thread.env.__getitem__)

    def _noted(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta = dict(node.meta)
        return new

    def _call(self) -> bool:
        """One block call of all patches that make it, if all of them have come there; whether there was one."""
        for thread in self.threads:
            name = thread.next.name
            if not is_block_call(thread.next):
                continue
            members = [patch for patch, other in enumerate(self.threads) if name in other.calls]
            if all(self.threads[patch].next.name == name for patch in members):
                self._call_of(members)
                return True
        return False

    def _call_of(self, members: Sequence[int]) -> None:
        node = self.threads[members[0]].next
        name, prefix, *_ = call_parts(node)
        interleave = f"{name}_{'_'.join(map(str, members))}"
        if interleave not in self.blocks:
            graphs = [self.programs[patch].blocks[name].graph for patch in members]
            self.blocks[interleave] = Block(interleave, _Weaver(graphs, self.programs).run())
        values: list[fx.Node] = []
        weights: dict[str, fx.Node] = {}
        for patch in members:
            thread = self.threads[patch]
            parts = call_parts(thread.next)
            values += [thread.env[value] for value in parts.values]
            weights |= {key: thread.env[value] for key, value in parts.weights.items()}
        args: Any = (interleave, prefix, values, weights)
        new = self._noted(node, self.graph.call_function(call_block, args))
        first = 0
        for patch in members:
            thread = self.threads[patch]
            thread.env[thread.next], thread.first[thread.next] = new, first
            first += len(results_of(self.programs[patch].blocks[name].graph))
            thread.at += 1

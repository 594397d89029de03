"""All patches of a stage as one program: a synchronous step, in which reads wait for the writes of all patches.

Ranks of a group talk in the order of the program that they were made from, and of two patches at the same place the
first comes first: an order by what a rank can do next would be another one on a rank that has no rows of some patch.
Everything that an exchange waits for stands before it, so the next one in that order never waits for a later one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Keep, Read, Recall, Write
from xdit_ir.ir.collective_ops import AllGather, Communicate
from xdit_ir.ir.graphs import operands, results_of
from xdit_ir.ir.program import CONSTANT, WEIGHT, Block, Program, call_block, call_parts, is_block_call
from xdit_ir.sharding.specialize import in_space

Names = Mapping[str, str]


def interleave(programs: Sequence[Program], received: Collection[str], whole: Program) -> Program:
    """One program for the programs of a stage's patches, which were made from `whole`, as those of all ranks were.

    Inputs are the model's, then those called `received` of the first patch, then those of the second, and so on, see
    `of_patch`; outputs those of the first patch, then those of the second, and so on.

    Raises:
        VerifyError: the patches wait for each other for ever.
    """
    if len(programs) == 1:
        return programs[0]
    constants, names = _constants(programs)
    weaver = _Weaver([program.graph for program in programs], programs, names, whole, whole.graph)
    graph = weaver.run(received)
    return programs[0].replace(graph=graph, blocks=weaver.blocks, constants=constants)


def of_patch(name: str, patch: int) -> str:
    """The name of what each patch has for itself."""
    return f"{name}_of_{patch}"


def _constants(programs: Sequence[Program]) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """Those of all programs, and what each program's are called in them: places of rows have one name in several."""
    found: dict[str, torch.Tensor] = {}
    names: list[dict[str, str]] = []
    for patch, program in enumerate(programs):
        names.append({})
        for name, held in program.constants.items():
            own = name if found.setdefault(name, held) is held else of_patch(name, patch)
            found[own] = held
            names[patch][f"{CONSTANT}.{name}"] = f"{CONSTANT}.{own}"
    return found, names


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
    """Writes the graphs of several patches into one; `names`: of each patch's constants, `source`: the graph of `whole`
    that they were made from."""

    def __init__(
        self,
        graphs: Sequence[fx.Graph],
        programs: Sequence[Program],
        names: Sequence[Names],
        whole: Program,
        source: fx.Graph,
    ) -> None:
        self.threads = [_Thread.of(graph) for graph in graphs]
        self.programs, self.names, self.whole = programs, names, whole
        self.places = {name: place for place, node in enumerate(source.nodes) for name in (node.name, in_space(node))}
        self.graph = fx.Graph()
        self.blocks: dict[str, Block] = {}
        self.made: dict[tuple[str, tuple[int, ...], frozenset[str]], str] = {}
        self.written: list[set[str]] = [set() for _ in graphs]
        self.kept: dict[str, fx.Node] = {}
        self.state: dict[str, fx.Node] = {}
        self.brought: dict[tuple[str, fx.Node], fx.Node] = {}

    def run(self, own: Collection[str] | None = None, parts: Collection[str] = ()) -> fx.Graph:
        """The graph of all; each patch has inputs called `own` (None: all) and weights called `parts` for itself."""
        self._inputs(own, parts)
        while any(thread.next.op != "output" for thread in self.threads):
            if not sum([self._advance(patch) for patch in range(len(self.threads))]) and not self._meet():
                stuck = ", ".join(f"patch {p} at {thread.next.name}" for p, thread in enumerate(self.threads))
                raise VerifyError(f"the patches of a synchronous step wait for each other for ever: {stuck}")
        results = [thread.env[value] for thread in self.threads for value in operands(thread.next)]
        self.graph.output(tuple(results))
        return self.graph

    def _inputs(self, own: Collection[str] | None, parts: Collection[str]) -> None:
        """Those of every patch, then the weights, which all patches share unless they have `parts` of them."""
        known: dict[str, fx.Node] = {}
        given = [
            (p, node) for p, thread in enumerate(self.threads) for node in thread.nodes if node.op == "placeholder"
        ]
        for patch, node in sorted(given, key=lambda one: WEIGHT in one[1].meta):
            weight = node.meta.get(WEIGHT)
            alone = (own is None or node.name in own) if weight is None else weight in parts
            name = of_patch(node.name, patch) if alone else node.name
            if name not in known:
                known[name] = new = self._noted(node, self.graph.create_node("placeholder", name, name=name))
                if weight is not None and alone:
                    new.meta[WEIGHT] = of_patch(weight, patch)
            self.threads[patch].env[node] = known[name]

    def _advance(self, patch: int) -> int:
        """Go on until something must be waited for, or others are met; how many nodes that were."""
        thread, start = self.threads[patch], self.threads[patch].at
        while (node := thread.next).op != "output" and self._is_ready(node):
            self._step(patch)
        return thread.at - start

    def _step(self, patch: int) -> None:
        thread = self.threads[patch]
        thread.env[thread.next] = self._node(thread.next, patch)
        thread.at += 1

    def _is_ready(self, node: fx.Node) -> bool:
        if isinstance(node.target, Read):
            slot = node.target.slot
            return all(slot in done for t, done in zip(self.threads, self.written, strict=True) if slot in t.writes)
        if isinstance(node.target, Recall):
            return node.target.slot in self.kept
        return not _meets(node)

    def _node(self, node: fx.Node, patch: int) -> fx.Node:
        thread = self.threads[patch]
        if node.op == "placeholder":
            return thread.env[node]
        if node.op == "get_attr":
            name = self.names[patch].get(str(node.target), str(node.target))
            if name not in self.state:
                self.state[name] = self._noted(node, self.graph.get_attr(name))
            return self.state[name]
        if isinstance(node.target, Recall):
            return self.kept[node.target.slot]
        if isinstance(node.target, Keep):
            self.kept[node.target.slot] = thread.env[operands(node)[0]]
            return self.kept[node.target.slot]
        if isinstance(node.target, Write):
            self.written[patch].add(node.target.slot)
        source = node.args[0] if node.args else None
        if brings(node):  # weights, once for all patches
            key = (node.name, thread.env[operands(node)[0]])
            if key not in self.brought:
                self.brought[key] = self.graph.node_copy(node, thread.env.__getitem__)
            return self.brought[key]
        if node.target is operator.getitem and source in thread.first:
            assert isinstance(source, fx.Node) and isinstance(node.args[1], int)
            place = thread.first[source] + node.args[1]
            return self._noted(node, self.graph.call_function(operator.getitem, (thread.env[source], place)))
        return self.graph.node_copy(node, thread.env.__getitem__)

    def _noted(self, node: fx.Node, new: fx.Node) -> fx.Node:
        new.meta = dict(node.meta)
        return new

    def _meet(self) -> bool:
        """The first exchange, or block call of all patches that make it; whether there was one."""
        waiting = [patch for patch, thread in enumerate(self.threads) if _meets(thread.next)]
        for patch in sorted(waiting, key=lambda one: self.places[self.threads[one].next.name]):
            node = self.threads[patch].next
            if not is_block_call(node):
                self._step(patch)
                return True
            members = [other for other, thread in enumerate(self.threads) if node.name in thread.calls]
            if all(self.threads[other].next.name == node.name for other in members):
                self._call_of(members)
                return True
        return False

    def _call_of(self, members: Sequence[int]) -> None:
        threads = [self.threads[patch] for patch in members]
        calls = [call_parts(thread.next) for thread in threads]
        values = [thread.env[value] for thread, call in zip(threads, calls, strict=True) for value in call.values]
        weights = [
            (key, place, thread.env[value])
            for place, (thread, call) in enumerate(zip(threads, calls, strict=True))
            for key, value in call.weights.items()
        ]
        parts = _differing((key, value) for key, _, value in weights)
        named = {of_patch(key, place) if key in parts else key: value for key, place, value in weights}
        name, prefix, *_ = calls[0]
        args: Any = (self._block(name, tuple(members), parts), prefix, values, named)
        new = self._noted(threads[0].next, self.graph.call_function(call_block, args))
        first = 0
        for patch, thread in zip(members, threads, strict=True):
            thread.env[thread.next], thread.first[thread.next] = new, first
            first += len(results_of(self.programs[patch].blocks[name].graph))
            thread.at += 1

    def _block(self, name: str, members: tuple[int, ...], parts: frozenset[str]) -> str:
        """The block of these patches in which each has `parts` of weights for itself."""
        key = (name, members, parts)
        if key not in self.made:
            own = f"{name}_{'_'.join(map(str, members))}"
            self.made[key] = own = own if own not in self.blocks else f"{own}_apart_{len(self.blocks)}"
            graphs = [self.programs[patch].blocks[name].graph for patch in members]
            names = [self.names[patch] for patch in members]
            weaver = _Weaver(graphs, self.programs, names, self.whole, self.whole.blocks[name].graph)
            self.blocks[own] = Block(own, weaver.run(parts=parts))
        return self.made[key]


def _meets(node: fx.Node) -> bool:
    """Whether others have to do the same at the same time: other ranks, or in a block all patches."""
    return is_block_call(node) or isinstance(node.target, Communicate)


def brings(node: fx.Node) -> bool:
    """Whether a node of a rank's program uploads or gathers weights, or takes one out of what was brought."""
    return node.target in (ops.upload, ops.unpack) or isinstance(node.target, AllGather)


def _differing(weights: Iterable[tuple[str, fx.Node]]) -> frozenset[str]:
    """The names that stand for several values: each patch has its own rows of a table, say."""
    found: dict[str, set[fx.Node]] = {}
    for name, value in weights:
        found.setdefault(name, set()).add(value)
    return frozenset(name for name, values in found.items() if len(values) > 1)

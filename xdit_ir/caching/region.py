"""Which part of a model a cache may leave out: from the first block, or behind it, to the end of the last one.

Found by how values flow. The region begins where streams enter a block; what leaves the region is matched with the
stream that it is by the additions, joins and cuts on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from xdit_ir.caching.rule import Watched
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.dataflow import Expanded, ProgramValue
from xdit_ir.ir.graphs import results_of
from xdit_ir.ir.hoist import ancestors, descendants
from xdit_ir.ir.program import SPEC, Program, TensorSpec, call_parts, is_block_call
from xdit_ir.pipefusion.latents import inputs_of, without

aten = torch.ops.aten
MOVES = frozenset(
    {
        *(aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.unsqueeze, aten.squeeze),
        *(aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.narrow, aten.chunk),
    }
)
COPIES = frozenset({aten.clone, aten._to_copy, aten.alias, aten.detach, aten.contiguous})
SUMS = frozenset({aten.add, aten.cat})
FIRSTS = frozenset({aten.addcmul, aten.type_as})  # what goes on is in the first operand


@dataclass(frozen=True)
class ReusedRegion:
    """`watched`: values whose change decides, each less another one where that is given. `results`: what the rest of
    the model takes of the region, each with the stream that the region adds to, if it is one. `calls`: of blocks, those
    in the region and the one that decides."""

    watched: Sequence[tuple[fx.Node, fx.Node | None]]
    results: Mapping[fx.Node, fx.Node | None]
    calls: Sequence[fx.Node]
    inside: Collection[fx.Node]
    rest: Collection[fx.Node]


def find_region(program: Program, watched: Watched) -> ReusedRegion:
    """The region of a program without layouts.

    Raises:
        ParallelizeError: the model has no blocks that follow each other, or nothing that can be watched.
    """
    return _Search(program, watched).region()


def latent_inputs(program: Program) -> frozenset[str]:
    """The inputs of an output's shape; else the largest of those that differ from one in one dim, or those that the
    main stream is made of."""
    shapes = [one.meta[SPEC].shape for one in results_of(program.graph)]
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.meta[SPEC].dtype.is_floating_point]
    like = [node for node in inputs if any(_alike(node.meta[SPEC].shape, one) for one in shapes)]
    largest = max((node.meta[SPEC].nbytes for node in like), default=0)
    same = frozenset(node.name for node in inputs if node.meta[SPEC].shape in shapes)
    axes = [axis.value for axis in program.tokens if not axis.is_context]
    found = same or frozenset(node.name for node in like if node.meta[SPEC].nbytes == largest)
    return found or (inputs_of(program, axes[0]) if axes else frozenset())


def _alike(shape: Sequence[int], other: Sequence[int]) -> bool:
    one_dim = (without(shape, dim) == without(other, dim) for dim in range(len(shape)))
    return len(shape) == len(other) > 2 and any(one_dim)


@dataclass
class _Search:
    program: Program
    watched: Watched
    expanded: Expanded = field(init=False)

    def __post_init__(self) -> None:
        self.expanded = Expanded(self.program)
        latents = latent_inputs(self.program)
        self.moving = descendants(node for node in self.program.graph.nodes if node.name in latents)

    def region(self) -> ReusedRegion:
        first = next((call for call in self.program.calls if call in self.moving), None)
        if first is None:
            raise ParallelizeError(f"cache: no block of {self.program.name} works on the latents; leave cache out")
        behind = self.watched is Watched.FIRST_BLOCK
        after = descendants([first]) - ({first} if behind else set())
        calls = [call for call in self.program.calls if call in after]
        if not calls:
            raise ParallelizeError(f"cache: {self.program.name} has one block, so nothing is left out behind it")
        inside = after & ancestors(calls)
        begins = [one for one in first.users if one.users] if behind else _floating(call_parts(first).values)
        results = self._results(inside, after - inside, begins)
        calls = list(dict.fromkeys([first, *calls]))
        return ReusedRegion(self._watched(first, begins), results, calls, inside, after - inside)

    def _results(
        self, inside: set[fx.Node], rest: set[fx.Node], begins: Sequence[fx.Node]
    ) -> dict[fx.Node, fx.Node | None]:
        found: dict[fx.Node, fx.Node | None] = {}
        leaving = ((node, user) for node in self.program.graph.nodes if node in inside for user in node.users)
        todo = [user if is_block_call(node) else node for node, user in leaving if user in rest]
        while todo:
            node = todo.pop(0)
            stream = self._stream(node, begins)
            users = [user for user in node.users if user in rest]
            if stream is None and all(packet_of(user) in MOVES for user in users):  # a part of it may be a stream
                todo += users
            elif node not in begins:
                found[node] = stream
        return found

    def _stream(self, node: fx.Node, begins: Sequence[fx.Node]) -> fx.Node | None:
        """Which of the streams a value is, if one of its type: of several, the one that is made of the latents."""
        values = {self.expanded.resolved(ProgramValue(None, one)): one for one in begins}
        reached = self._carried(self.expanded.resolved(ProgramValue(None, node)), values)
        found = [one for one in reached if one.meta[SPEC] == node.meta[SPEC]]
        if len(found) > 1:
            found = [one for one in found if self._base(one) in self.moving]
        return found[0] if len(found) == 1 else None

    def _carried(self, start: ProgramValue, goals: Mapping[ProgramValue, fx.Node]) -> list[fx.Node]:
        """The goals that additions, joins and cuts lead back to."""
        seen, todo, found = set[ProgramValue](), [start], dict[fx.Node, None]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in goals:
                found[goals[value]] = None
            elif (packet := packet_of(value.node)) in MOVES | COPIES | SUMS:
                todo += self.expanded.sources(value)
            elif packet in FIRSTS:
                todo += self.expanded.sources(value)[:1]
        return list(found)

    def _base(self, begin: fx.Node) -> fx.Node | None:
        """What a stream was in front of the first block, if the region begins behind it."""
        if self.watched is not Watched.FIRST_BLOCK:
            return begin
        [call] = begin.all_input_nodes
        given = {self.expanded.resolved(ProgramValue(None, one)): one for one in _floating(call_parts(call).values)}
        reached = self._carried(self.expanded.resolved(ProgramValue(None, begin)), given)
        found = [one for one in reached if one.meta[SPEC] == begin.meta[SPEC]]
        moving = [one for one in found if one in self.moving] or found
        return moving[0] if moving else None

    def _watched(self, first: fx.Node, begins: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node | None]]:
        if self.watched is Watched.NOTHING:
            return []
        if self.watched is Watched.FIRST_BLOCK:
            bases = {one: self._base(one) for one in begins}
            main = {one: base for one, base in bases.items() if base in self.moving}
            return list((main or bases).items())
        inputs = self.program.graph.find_nodes(op="placeholder")
        timed = descendants(node for node in inputs if len(node.meta[SPEC].shape) < 2)
        found = [one for one in _floating(call_parts(first).values) if one in timed - self.moving]
        found = [one for one in found if one not in descendants(self.program.calls)] or found
        if not found:
            raise ParallelizeError(
                "cache='timestep:...': the first block is given nothing that follows from a number for each sample "
                "alone; nearest: cache='first-block:0.08'"
            )
        return [(one, None) for one in dict.fromkeys(found)]


def _floating(values: Iterable[fx.Node]) -> list[fx.Node]:
    def floats(node: fx.Node) -> bool:
        spec = node.meta[SPEC]
        return isinstance(spec, TensorSpec) and spec.dtype.is_floating_point

    return [node for node in dict.fromkeys(values) if floats(node)]


def packet_of(node: fx.Node) -> object:
    """The operator of a node without its overload; picking a result is a cut."""
    if node.target in (ops.take, ops.take_each):
        return aten.slice
    if getattr(node.target, "__name__", "") == "getitem":
        return aten.split
    return getattr(node.target, "overloadpacket", node.target)

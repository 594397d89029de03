"""`shard-weights`: ranks hold equal parts of the weights, on their GPU or with the host, and what a block needs is
brought to it one block ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, operands, remove_dead, write_relayout
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Program, is_block_call
from xdit_ir.ir.stored import is_packed, packed
from xdit_ir.passes.residency import Brought, staying
from xdit_ir.passes.stored_weights import cut_weights, fresh_name, part_layout, stored_node
from xdit_ir.pipefusion.stage_split import stage_homes
from xdit_ir.sharding.gathered_weights import local_most, work_seconds
from xdit_ir.sharding.machine import H100, Machine

FEWEST = 8  # parts of a model without blocks, of which two are whole at a time


@dataclass(frozen=True)
class ShardWeights:
    """The weights of each block call lie one behind the other in bytes, of which every rank holds an equal part; so do
    those of what stands between calls. The parts are gathered, all at once, before the call before begins, so they
    travel while that computes, and are let go of behind the call. Stages of a pipeline do so each for itself. Of a
    weight of which ranks compute with their own rows only, they hold these, and nothing is gathered. What an earlier
    program of the model has stored stays as it is.

    `paired`: the parts of `cfg` run different calls, so nothing is divided between them. `stream`: what a rank holds
    lies in the host's memory, but for `resident` bytes at most, which are chosen by the speeds of `machine`. It is
    uploaded before the last call before that streams begins, or, if it is then to be gathered, one call earlier; one
    rank uploads all. `before`: names of what an earlier program has stored. `along`: mesh dims, joined by `+`, if only
    ranks that differ along these divide weights among them; others then have the same parts.
    """

    name: ClassVar[str] = "shard-weights"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh
    paired: bool = False
    stream: bool = False
    resident: int = 0
    machine: Machine = H100
    before: frozenset[str] = frozenset()
    along: str = ""

    def apply(self, program: Program) -> Program:
        """The program whose weights are divided over ranks that run the same call, or lie with the host."""
        every = self.mesh.dims_of_a_call(paired=self.paired)
        dims = self.mesh.dims_of_a_call(paired=self.paired, along=self.along.split("+") if self.along else ())
        if self.mesh.size(dims) == 1 and not self.stream:
            return program
        program = cut_weights(program, self.mesh, every)
        program = program.replace(graph=copy_graph(program.graph), stored=dict(program.stored))
        _Writer(program, self, dims).write()
        return program


@dataclass(frozen=True, eq=False)
class _Unit:
    """A block call, or a run of other operators that use weights: what brings the weights of one brings them all.
    `stages`: those that compute it, the only one where there are none; `needs`: of what is stored."""

    nodes: Sequence[fx.Node]
    stages: frozenset[int]
    needs: Sequence[str] = ()


@dataclass
class _Writer:
    """Rewrites the outer graph of a `program` whose graph and `stored` are its own. `own`: parts of which ranks use
    their own only, if these are to stream."""

    program: Program
    how: ShardWeights
    dims: tuple[str, ...]
    parts: dict[str, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        held = self.program.graph.find_nodes(op="get_attr") if self.how.stream else ()
        self.own = {str(node.target): node for node in held if node.target in self.program.stored}
        self.parts |= self.own
        self.ranks = self.how.mesh.size(self.dims)
        self.coordinates = self.program.coordinates or (0,)
        self.stages: Mapping[fx.Node, frozenset[int]] = {}
        if self.program.coordinates:
            self.stages = stage_homes(self.program.graph, len(self.coordinates))

    def write(self) -> None:
        """Store weights, bring them one unit ahead, and take them out where they are used."""
        units = [_Unit(nodes, self._stages(nodes[0])) for nodes in self._runs()]
        needed = self._store([self._weights(unit.nodes) for unit in units])
        units = [replace(unit, needs=needs) for unit, needs in zip(units, needed, strict=True)]
        if self.how.stream:
            self._choose_hosts(units)
        wholes = [{name: self._brought(name, at, units) for name in unit.needs} for at, unit in enumerate(units)]
        for unit, whole in zip(units, wholes, strict=True):
            self._take_out(unit.nodes, whole)
        remove_dead(self.program.graph)

    def _stages(self, node: fx.Node) -> frozenset[int]:
        return self.stages.get(node, frozenset({0}))

    def _runs(self) -> Iterator[Sequence[fx.Node]]:
        """The nodes of each unit: none of more bytes than a call has, and of one stage."""
        size = {node: self._bytes([node]) for node in self.program.graph.nodes if self._weights([node])}
        limit = max((size[call] for call in self.program.calls if call in size), default=0)
        limit = limit or sum(size.values()) // FEWEST
        run: list[fx.Node] = []
        for node in size:
            calls = is_block_call(node) or (run and is_block_call(run[-1]))
            if run and (calls or self._stages(node) != self._stages(run[0]) or self._bytes([*run, node]) > limit):
                yield run
                run = []
            run.append(node)
        if run:
            yield run

    def _weights(self, nodes: Sequence[fx.Node]) -> dict[str, fx.Node]:
        """What is to be brought for a unit, by name: weights, and if they stream, parts of which ranks use their own
        only; those without elements are held whole."""
        found = (one for node in nodes for one in operands(node) if one.op == "get_attr" and one.meta[SPEC].nbytes)
        return {str(one.target): one for one in found if one.target in self.program.state or one.target in self.own}

    def _bytes(self, nodes: Sequence[fx.Node]) -> int:
        return sum(weight.meta[SPEC].nbytes for weight in self._weights(nodes).values())

    def _store(self, used: Sequence[Mapping[str, fx.Node]]) -> list[list[str]]:
        """Store together what the same units use; per unit, what it needs of all that is stored."""
        homes = {name: stored for stored, one in self.program.stored.items() for name, _ in one.members}
        homes |= {name: name for name in self.own}
        together: dict[tuple[int, ...], list[str]] = {}
        for name, units in _users(used).items():
            if name not in homes:
                together.setdefault(units, []).append(name)
        for group in together.values():
            key = fresh_name(group, self.program.stored)
            stored = packed({name: self.program.state[name] for name in group}, self.ranks)
            self.program.stored[key] = stored  # type: ignore[index]
            homes |= dict.fromkeys(group, key)
        return [list(dict.fromkeys(homes[name] for name in names)) for names in used]

    def _choose_hosts(self, units: Sequence[_Unit]) -> None:
        """Note of what is new whether it lies with the host: where there is room on the GPU, some of it does not."""
        stored = self.program.stored
        found = {name: Brought(self._held(name), at) for name, at in _users([unit.needs for unit in units]).items()}
        stages = {name: {stage for at in one.units for stage in units[at].stages} for name, one in found.items()}
        places = {name: {self.coordinates[stage] for stage in of} for name, of in stages.items()}
        for place in sorted(set(self.coordinates)):
            mine = {name: one for name, one in found.items() if places[name] == {place}}
            new = {name: one for name, one in mine.items() if name not in self.how.before}
            here = sum(one.size for name, one in mine.items() if name not in new and not self._streams(name))
            stay = staying(new, *self._times(units, place), self.how.resident - here)
            for name in found.keys() - self.how.before:
                if place in places[name]:
                    stored[name] = replace(stored[name], on_host=name not in stay)  # type: ignore[index]

    def _streams(self, name: str) -> bool:
        return self.program.stored[name].on_host

    def _held(self, name: str) -> int:
        """Bytes of something stored on the rank that has most of it."""
        if name in self.own:
            return local_most(self.own[name], self.how.mesh)
        return self.program.stored[name].spec.nbytes // self.ranks

    def _times(self, units: Sequence[_Unit], place: int) -> tuple[list[float], float]:
        """Seconds of a rank's work before each of these units, and of all."""
        seconds, now, found = work_seconds(self.program, self.how.mesh, self.how.machine), 0.0, dict[fx.Node, float]()
        for node in self.program.graph.nodes:
            found[node] = now
            if any(self.coordinates[stage] == place for stage in self._stages(node)):
                now += seconds(node)
        return [found[unit.nodes[0]] for unit in units], now

    def _brought(self, name: str, at: int, units: Sequence[_Unit]) -> fx.Node:
        """What is stored as unit `at` needs it: gathered one unit of its stage ahead, and uploaded before the last
        unit before that has uploads begins, or if these are to be gathered, when that is."""
        graph, gathers = self.program.graph, self.ranks > 1 and name not in self.own
        earlier = [unit for unit in units[:at] if unit.stages & units[at].stages]
        begins = [unit.nodes[0] for unit in earlier] or [units[0].nodes[0]]
        if name not in self.parts:
            stored = self.program.stored[name]
            layout = part_layout(stored.spec, self.how.mesh, self.dims)
            self.parts[name] = stored_node(graph, name, stored, layout)
        value = self.parts[name]
        if self._streams(name):
            last = max((n for n, unit in enumerate(earlier) if any(map(self._streams, unit.needs))), default=0)
            with graph.inserting_before(begins[max(last - gathers, 0)]):
                value = write_relayout(graph, value, ops.upload, value.meta[LAYOUT])
        if gathers:
            with graph.inserting_before(begins[-1]):
                value = write_relayout(graph, value, ops.gather, Layout.whole(len(value.meta[SPEC].shape)))
        return value

    def _take_out(self, unit: Sequence[fx.Node], whole: Mapping[str, fx.Node]) -> None:
        """Give the nodes of a unit the weights out of what is gathered for it."""
        places = {name: (stored, at) for stored in whole for name, at in self.program.stored[stored].members}
        places |= {name: (name, 0) for name in self.own}
        for name, weight in self._weights(unit).items():
            stored, start = places[name]
            new = whole[stored]
            if name not in self.own and is_packed(self.program.stored[stored], self.program.state):
                new = self._unpacked(new, start, weight, unit[0])
            for node in unit:
                node.replace_input_with(weight, new)

    def _unpacked(self, source: fx.Node, start: int, weight: fx.Node, before: fx.Node) -> fx.Node:
        spec, graph = weight.meta[SPEC], self.program.graph
        with graph.inserting_before(before):
            args = (source, start, spec.dtype, list(spec.shape))
            new = graph.create_node("call_function", ops.unpack, args, name=f"{weight.name}_whole")
        new.meta = {key: weight.meta[key] for key in (SPEC, LAYOUT, WHERE) if key in weight.meta}
        return new


def _users(used: Sequence[Iterable[str]]) -> dict[str, tuple[int, ...]]:
    """By which units each name is used."""
    found: dict[str, tuple[int, ...]] = {}
    for at, names in enumerate(used):
        for name in names:
            found[name] = (*found.get(name, ()), at)
    return found

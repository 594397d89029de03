"""The schedule of a parallel program, worked out from sizes and the speeds of a `Machine`: who computes what when.

A rank has a processor and links. An exchange starts where it stands, as soon as all that take part in it have its
operand and free links, and is awaited by the first operator that computes with its result; views do not wait. A stage
of a pipeline starts a patch when it is free, its turn has come and the message of the stage before is there. A warmup
step passes each stage with all patches before the next one; in displaced steps a patch begins when it is back from the
step before, as deferred results allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from xdit_ir.api import ParallelProgram
from xdit_ir.inspection.durations import Cost, Durations
from xdit_ir.inspection.model import Span, Timeline
from xdit_ir.ir.dataflow import Expanded, ProgramValue
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import Program, call_parts, called_block
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.sharding.machine import Machine

Place = tuple[str, str]  # a call's prefix, and a name in it
DISPLACED = 2  # steps shown after the warmup


@dataclass
class Clock:
    """One rank: when its processor and its links are free, and what it has done, in seconds."""

    now: float = 0.0
    link: float = 0.0
    spans: list[Span] = field(default_factory=list)
    _last: dict[str, int] = field(default_factory=dict)

    def add(self, span: Span) -> None:
        """Note a span; joined to the one before where both are one piece of work."""
        if span.lane in self._last:
            place = self._last[span.lane]
            last = self.spans[place]
            same = (last.name, last.patch, last.step) == (span.name, span.patch, span.step)
            if same and span.lane == "compute" and span.start - last.end < 1e-9:
                self.spans[place] = replace(last, end=span.end)
                return
        self._last[span.lane] = len(self.spans)
        self.spans.append(span)


@dataclass(frozen=True)
class Task:
    """One operator in the order of execution, under the name of its call or place, with where its operands are."""

    node: fx.Node
    name: str
    key: Place
    sources: tuple[Place, ...]


@dataclass(frozen=True)
class Team:
    """The ranks that run a program together, and what each is in the mesh of its layouts."""

    ranks: tuple[int, ...]
    places: tuple[int, ...]
    mesh: Mesh
    stage: int = -1
    patch: int = -1
    step: int = 0


def timeline(parallel: ParallelProgram, machine: Machine | None = None) -> Timeline:
    """The schedule of one forward, or under PipeFusion of the warmup and two displaced steps."""
    machine = machine or parallel.machine
    clocks = [Clock() for _ in range(parallel.world_size)]
    if parallel.pipeline is not None:
        steps = _run_pipeline(parallel.pipeline, machine, clocks)
    else:
        durations = Durations(parallel.mesh, machine)
        ranks = tuple(range(parallel.world_size))
        _run(list(tasks(parallel.ir, None)), Team(ranks, ranks, parallel.mesh), durations, clocks)
        steps = ["one forward"]
    spans = [replace(span, rank=rank) for rank, clock in enumerate(clocks) for span in clock.spans]
    total = max((span.end for span in spans), default=0.0)
    busy = [sum(s.end - s.start for s in clock.spans if s.lane == "compute") / max(total, 1e-12) for clock in clocks]
    note = f"Worked out from sizes for ranks with {machine}; not measured."
    micro = [replace(s, start=round(s.start * 1e6, 2), end=round(s.end * 1e6, 2)) for s in spans]
    return Timeline(micro, round(total * 1e6, 2), [round(part, 4) for part in busy], steps, note)


def tasks(program: Program, wanted: Mapping[str, set[str]] | None) -> Iterator[Task]:
    """The operators in the order of execution, calls expanded; only those `wanted` of each graph, by its name."""
    expanded = Expanded(program)

    def place(value: ProgramValue) -> Place:
        return "" if value.call is None else call_parts(value.call).prefix, value.node.name

    for value in expanded:
        call, node = value.call, value.node
        graph = "" if call is None else called_block(call)
        reached = call is None or _is_wanted(wanted, "", call)
        if node.op == "call_function" and reached and _is_wanted(wanted, graph, node):
            where = "around the blocks" if call is None else call_parts(call).prefix
            yield Task(node, where, place(value), tuple(map(place, expanded.sources(value))))


def _is_wanted(wanted: Mapping[str, set[str]] | None, graph: str, node: fx.Node) -> bool:
    return wanted is None or node.name in wanted.get(graph, ())


def _run(todo: Sequence[Task], team: Team, durations: Durations, clocks: Sequence[Clock]) -> None:
    """Let the ranks of a team do these tasks; their clocks go on."""
    ready: dict[Place, list[float]] = {}
    start = [0.0] * len(team.ranks)
    for task in todo:
        cost = durations.of(task.node)
        known = [ready.get(source, start) for source in task.sources]
        when = [max((one[i] for one in known), default=0.0) for i in range(len(team.ranks))]
        if cost.travels:
            ready[task.key] = _exchange(task, when, team, cost, clocks)
        else:
            ready[task.key] = [
                _work(task, when[i], team, cost, clocks[rank], team.places[i]) for i, rank in enumerate(team.ranks)
            ]


def _work(task: Task, when: float, team: Team, cost: Cost, clock: Clock, place: int) -> float:
    """Let one rank compute, if there is anything to compute; returns when the result is there."""
    seconds = cost.seconds[place]
    if seconds == 0:
        return when
    begin = max(clock.now, when)
    clock.now = begin + seconds
    clock.add(_span(task.name, "compute", "compute", begin, clock.now, team))
    if cost.around and cost.sent[place]:
        sent = begin + cost.around[place]
        clock.add(_span(f"{task.name}: {task.node.name}", "link", cost.kind, begin, sent, team, cost.sent[place]))
    return clock.now


def _exchange(task: Task, when: list[float], team: Team, cost: Cost, clocks: Sequence[Clock]) -> list[float]:
    """Let the ranks exchange as soon as all of a group can; returns when the result is there, on each rank."""
    begin = [max(at, clocks[rank].now, clocks[rank].link) for at, rank in zip(when, team.ranks, strict=True)]
    done = list(begin)
    place = {at: i for i, at in enumerate(team.places)}
    for i, at in enumerate(team.places):
        members = [place[peer] for peer in team.mesh.group(at, cost.over) if peer in place]
        together = max(begin[member] for member in members)
        done[i] = together + max(cost.seconds[team.places[member]] for member in members)
        clock = clocks[team.ranks[i]]
        clock.link = done[i]
        label = f"{task.name}: {task.node.name}"
        clock.add(_span(label, "link", cost.kind, together, done[i], team, cost.sent[at]))
    return done


def _span(name: str, lane: str, kind: str, start: float, end: float, team: Team, sent: int = 0) -> Span:
    return Span(0, lane, name, kind, start, end, team.stage, team.patch, team.step, sent)


def _run_pipeline(pipeline: Pipeline, machine: Machine, clocks: Sequence[Clock]) -> list[str]:
    runner = _PipelineClock(pipeline, machine, clocks)
    warmup = range(pipeline.warmup_steps)
    displaced = range(pipeline.warmup_steps, pipeline.warmup_steps + DISPLACED)
    for step in warmup:
        runner.warmup(step)
    runner.displaced(displaced)
    return [f"step {n}: warmup, all patches together" for n in warmup] + [f"step {n}: displaced" for n in displaced]


class _PipelineClock:
    def __init__(self, pipeline: Pipeline, machine: Machine, clocks: Sequence[Clock]) -> None:
        self.pipeline, self.machine, self.clocks = pipeline, machine, clocks
        self.durations = Durations(pipeline.virtual, machine, over_time=True)
        self._todo: dict[tuple[int, int], list[Task]] = {}

    def warmup(self, number: int) -> None:
        """One step in which all patches pass each stage before the next one begins."""
        gate = max(clock.now for clock in self.clocks)
        for stage in range(self.pipeline.stages):
            arrived = [max(self._compute(stage, patch, number, [gate])) for patch in range(self.pipeline.patches)]
            gate = max(arrived)

    def displaced(self, numbers: Sequence[int]) -> None:
        """Steps in which each rank takes its turns; a patch begins when it is back from the step before."""
        begin = max(clock.now for clock in self.clocks)
        stages, patches = range(self.pipeline.stages), range(self.pipeline.patches)
        arrived: dict[int, list[float]] = {patch: [begin] for patch in patches}
        turns = itertools.product(numbers, stages, patches)
        for step, stage, patch in sorted(turns, key=lambda one: self.pipeline.issue_order(one[1], one[0], one[2])):
            arrived[patch] = self._compute(stage, patch, step, arrived[patch])

    def _compute(self, stage: int, patch: int, step: int, arrived: Sequence[float]) -> list[float]:
        """Let the ranks of a stage compute a patch; returns when what they made is where it is wanted."""
        team = self._team(stage, patch, step)
        for rank in team.ranks:
            self.clocks[rank].now = max(self.clocks[rank].now, *arrived)
        _run(self._tasks(stage, team), team, self.durations, self.clocks)
        return [self._send(stage, rank, place, team) for rank, place in zip(team.ranks, team.places, strict=True)]

    def _team(self, stage: int, patch: int, step: int) -> Team:
        virtual = self.pipeline.virtual
        places = tuple(v for v in range(virtual.world_size) if virtual.index(v, (TIME,)) == patch)
        ranks = tuple(self.pipeline.rank(stage, v) for v in places)
        return Team(ranks, places, virtual, stage, patch, step)

    def _tasks(self, stage: int, team: Team) -> list[Task]:
        key = (stage, team.patch)
        if key not in self._todo:
            part = self.pipeline.part(stage, team.places[0]).program
            wanted = {name: {node.name for node in graph.nodes} for name, graph, _ in all_graphs(part)}
            self._todo[key] = list(tasks(self.pipeline.program, wanted))
        return self._todo[key]

    def _send(self, stage: int, rank: int, place: int, team: Team) -> float:
        """When the message of a rank is with the next stage; what stays on the rank is there at once."""
        part, clock = self.pipeline.part(stage, place), self.clocks[rank]
        if not part.sends:
            return clock.now
        size = sum(spec.nbytes for spec in part.message(sent=True))
        begin = max(clock.now, clock.link)
        clock.link = begin + self.machine.latency + self.machine.seconds(0, size)
        clock.add(_span(f"to stage {stage + 1}", "link", "send", begin, clock.link, team, size))
        return clock.link

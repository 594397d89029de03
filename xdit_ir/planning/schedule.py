"""The schedule of a parallel program, worked out from sizes and what a machine can do: who computes what when.

A rank has a processor and links. An exchange starts where it stands, as soon as all that take part in it have its
operand and free links, and is awaited by the first operator that computes with its result; views do not wait. Where no
copy engine does it, the processor waits meanwhile. A stage
of a pipeline starts a patch when it is free, its turn has come and the message of the stage before is there. A warmup
step passes each stage with all patches before the next one; in displaced steps a patch begins when it is back from the
step before, as deferred results allow.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from xdit_ir.api import ParallelProgram
from xdit_ir.ir.dataflow import Expanded, ProgramValue
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import Program, call_parts, called_block
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.planning.durations import Cost, Durations
from xdit_ir.planning.hardware import Hardware, hardware_of
from xdit_ir.planning.spans import Span, Timeline
from xdit_ir.planning.work import WorkKind
from xdit_ir.sharding.machine import Machine

Place = tuple[str, str]  # a call's prefix, and a name in it
DISPLACED = 2  # steps shown after the warmup


@dataclass
class Clock:
    """One rank: when its processor, its links and its way to the host's memory (`bus`) are free, and what it has done,
    in seconds; `work`: by step and kind; `kernels`, `exchanges`: how many it has started, by step."""

    now: float = 0.0
    link: float = 0.0
    bus: float = 0.0
    spans: list[Span] = field(default_factory=list)
    work: dict[tuple[int, WorkKind], float] = field(default_factory=lambda: defaultdict(float))
    kernels: Counter[int] = field(default_factory=Counter)
    exchanges: Counter[int] = field(default_factory=Counter)
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
class RankGroup:
    """The ranks that run a program together, and what each is in the mesh of its layouts."""

    ranks: tuple[int, ...]
    places: tuple[int, ...]
    mesh: Mesh
    stage: int = -1
    patch: int = -1
    step: int = 0


@dataclass(frozen=True)
class Schedule:
    """What every rank does; `steps`: what is said of each step."""

    clocks: Sequence[Clock]
    steps: Sequence[str]
    spans: Sequence[Span]

    @property
    def end(self) -> float:
        """Seconds from the begin to the end."""
        return max((span.end for span in self.spans), default=0.0)

    def step(self) -> tuple[int, float]:
        """The last step, and its seconds: from the end of the one before, since steps are alike."""
        last = len(self.steps) - 1
        ends = [max((one.end for one in self.spans if one.step == step), default=0.0) for step in (last - 1, last)]
        between = ends[1] - ends[0] if last else self.end
        # the first steps may follow each other faster than all can
        return last, max(between, *(self.seconds(rank, last) for rank in range(len(self.clocks))))

    def seconds(self, rank: int, step: int) -> float:
        """In which a rank computes in one step."""
        return sum(seconds for (at, _), seconds in self.clocks[rank].work.items() if at == step)


def schedule(parallel: ParallelProgram, hardware: Hardware, *, flash: bool = False) -> Schedule:
    """Of one forward, or under PipeFusion of the warmup and two displaced steps; `flash` as for `Durations`."""
    clocks = [Clock() for _ in range(parallel.world_size)]
    if parallel.pipeline is not None:
        steps = _run_pipeline(parallel.pipeline, hardware, clocks, flash)
    else:
        durations = Durations(parallel.mesh, hardware, flash=flash)
        ranks = tuple(range(parallel.world_size))
        _run(list(tasks(parallel.ir, None)), RankGroup(ranks, ranks, parallel.mesh), durations, clocks)
        steps = ["one forward"]
    return Schedule(clocks, steps, [replace(span, rank=rank) for rank, one in enumerate(clocks) for span in one.spans])


def timeline(parallel: ParallelProgram, machine: str | Machine | Hardware | None = None) -> Timeline:
    """The schedule as it is shown; the machine is that of the program if none is given."""
    hardware = hardware_of(parallel.machine if machine is None else machine)
    found = schedule(parallel, hardware)
    total, count = found.end, len(found.steps)
    busy = [sum(found.seconds(rank, n) for n in range(count)) / max(total, 1e-12) for rank in range(len(found.clocks))]
    note = f"Worked out from sizes for ranks with {hardware}; not measured."
    micro = [replace(s, start=round(s.start * 1e6, 2), end=round(s.end * 1e6, 2)) for s in found.spans]
    return Timeline(micro, round(total * 1e6, 2), [round(part, 4) for part in busy], found.steps, note)


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


def _run(todo: Sequence[Task], team: RankGroup, durations: Durations, clocks: Sequence[Clock]) -> None:
    """Let the ranks of a team do these tasks; their clocks go on."""
    ready: dict[Place, list[float]] = {}
    start = [0.0] * len(team.ranks)
    for task in todo:
        cost = durations.of(task.node)
        known = [ready.get(source, start) for source in task.sources]
        when = [max((one[i] for one in known), default=0.0) for i in range(len(team.ranks))]
        if cost.travels and not cost.over:
            ready[task.key] = _upload(task, when, team, cost, clocks)
        elif cost.travels:
            ready[task.key] = _exchange(task, when, team, cost, clocks)
        else:
            ready[task.key] = [
                _work(task, when[i], team, cost, clocks[rank], team.places[i]) for i, rank in enumerate(team.ranks)
            ]


def _work(task: Task, when: float, team: RankGroup, cost: Cost, clock: Clock, place: int) -> float:
    """Let one rank compute, if there is anything to compute; returns when the result is there."""
    seconds = cost.seconds[place]
    if seconds == 0:
        return when
    begin = max(clock.now, when)
    clock.now = begin + seconds
    clock.work[team.step, cost.work] += seconds
    clock.kernels[team.step] += cost.starts
    clock.add(_span(task.name, "compute", "compute", begin, clock.now, team))
    if cost.around and cost.sent[place]:
        clock.exchanges[team.step] += 1
        sent = begin + cost.around[place]
        clock.add(_span(f"{task.name}: {task.node.name}", "link", cost.kind, begin, sent, team, cost.sent[place]))
    return clock.now


def _exchange(task: Task, when: list[float], team: RankGroup, cost: Cost, clocks: Sequence[Clock]) -> list[float]:
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
        clock.now = max(clock.now, clock.now if cost.hidden else done[i]) + cost.kept[at]
        clock.work[team.step, WorkKind.MEMORY] += cost.kept[at]
        clock.exchanges[team.step] += 1
        label = f"{task.name}: {task.node.name}"
        clock.add(_span(label, "link", cost.kind, together, done[i], team, cost.sent[at]))
    return done


def _upload(task: Task, when: list[float], team: RankGroup, cost: Cost, clocks: Sequence[Clock]) -> list[float]:
    """Let each rank read what lies with its host, beside all else; returns when it is there, on each rank."""
    done = []
    for at, rank, place in zip(when, team.ranks, team.places, strict=True):
        clock = clocks[rank]
        begin = max(at, clock.now, clock.bus)
        clock.bus = begin + cost.seconds[place]
        label = f"{task.name}: {task.node.name}"
        clock.add(_span(label, "link", cost.kind, begin, clock.bus, team, cost.sent[place]))
        done.append(clock.bus)
    return done


def _span(name: str, lane: str, kind: str, start: float, end: float, team: RankGroup, sent: int = 0) -> Span:
    return Span(0, lane, name, kind, start, end, team.stage, team.patch, team.step, sent)


def _run_pipeline(pipeline: Pipeline, hardware: Hardware, clocks: Sequence[Clock], flash: bool) -> list[str]:
    runner = _PipelineClock(pipeline, hardware, clocks, flash)
    warmup = range(pipeline.warmup_steps)
    displaced = range(pipeline.warmup_steps, pipeline.warmup_steps + DISPLACED)
    for step in warmup:
        runner.warmup(step)
    runner.displaced(displaced)
    return [f"step {n}: warmup, all patches together" for n in warmup] + [f"step {n}: displaced" for n in displaced]


class _PipelineClock:
    def __init__(self, pipeline: Pipeline, hardware: Hardware, clocks: Sequence[Clock], flash: bool) -> None:
        self.pipeline, self.hardware, self.clocks = pipeline, hardware, clocks
        self.durations = Durations(pipeline.virtual, hardware, over_time=True, flash=flash)
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

    def _team(self, stage: int, patch: int, step: int) -> RankGroup:
        virtual = self.pipeline.virtual
        places = tuple(v for v in range(virtual.world_size) if virtual.index(v, (TIME,)) == patch)
        ranks = tuple(self.pipeline.rank(stage, v) for v in places)
        return RankGroup(ranks, places, virtual, stage, patch, step)

    def _tasks(self, stage: int, team: RankGroup) -> list[Task]:
        key = (stage, team.patch)
        if key not in self._todo:
            part = self.pipeline.part(stage, team.places[0]).program
            wanted = {name: {node.name for node in graph.nodes} for name, graph, _ in all_graphs(part)}
            self._todo[key] = list(tasks(self.pipeline.program, wanted))
        return self._todo[key]

    def _send(self, stage: int, rank: int, place: int, team: RankGroup) -> float:
        """When the message of a rank is with the next stage; what stays on the rank is there at once."""
        part, clock = self.pipeline.part(stage, place), self.clocks[rank]
        if not part.sends:
            return clock.now
        size = sum(spec.nbytes for spec in part.message(sent=True))
        begin = max(clock.now, clock.link)
        peer = self.pipeline.rank(stage + 1, place)
        clock.link = begin + self.hardware.link((rank, peer)).seconds(size)
        clock.add(_span(f"to stage {stage + 1}", "link", "send", begin, clock.link, team, size))
        return clock.link

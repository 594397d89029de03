"""Gathers an inspection: pictures before and after, what each pass changed, the report, the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.inspection.model import Figure, Inspection, PassStep, Rows, StageView
from xdit_ir.inspection.views import view
from xdit_ir.ir.mesh import DIMS, MESH_DIMS
from xdit_ir.ir.printer import body_text, outer_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import After, run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.order import analysis_passes, peer_passes, rank_passes
from xdit_ir.passes.registry import describe
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.planning.hardware import Hardware, hardware_of
from xdit_ir.planning.schedule import timeline
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.sharding.report import Report
from xdit_ir.sharding.specialize import Specialize


def inspect(traced: TracedProgram, model: str, machine: str | Machine | Hardware = H100, **degrees: Any) -> Inspection:
    """Everything that there is to see of a program, and of what these degrees make of it; none: of the program alone.

    Raises:
        ParallelizeError: as `parallelize`.
    """
    history = History(traced.ir)
    run_passes(traced.ir, analysis_passes(rows=traced.rows), history.after)
    named = ", ".join(f"{name} {size}" for name, size in degrees.items() if name in MESH_DIMS) or "one device"
    if not degrees:
        before = view(traced.ir)
        return Inspection(traced.ir.name, model, named, {}, before, None, history.steps, list(history.lines))
    hardware = hardware_of(machine)
    prices = machine if isinstance(machine, Machine) else hardware.prices
    parallel = traced.parallelize(**degrees, machine=prices, after=history.after)
    report, stages = parallel.report(), _stages_of(parallel.pipeline)
    schedule = timeline(parallel, hardware)
    wide = {name: size for name, size in parallel.mesh.degrees.items() if size > 1}
    return Inspection(
        title=traced.ir.name,
        model=model,
        degrees=named,
        mesh=wide,
        before=view(traced.ir),
        after=view(parallel.ir, stages),
        passes=history.steps,
        lines=list(history.lines),
        facts=list(_facts(parallel, report, schedule.total)),
        tables=list(_tables(report)),
        stages=list(_stage_views(parallel.pipeline)),
        timeline=schedule,
        legend={dim.name: dim.says for dim in DIMS if dim.name in wide},
    )


def lower_rank(parallel: ParallelProgram, rank: int, capability: tuple[int, int] | None, after: After) -> None:
    """Run the passes over one rank's program as on a GPU of this compute capability that records CUDA graphs and
    reaches its peers; None: on the CPU. Of a pipeline, over what the rank does first."""
    if parallel.pipeline is None:
        peers = [] if capability is None else peer_passes(rank)
        run_passes(parallel.ir, [Specialize(rank), *rank_passes(capability, recorded=True), *peers], after)
    else:
        task = next(iter(RankTasks(parallel.pipeline, rank).displaced.values()))
        run_passes(task.program, rank_passes(capability, recorded=True), after)


class History:
    """What each pass left of the text of every graph; equal lines are kept once."""

    def __init__(self, program: Program) -> None:
        self.lines: dict[str, int] = {}
        self.steps: list[PassStep] = []
        self._texts: dict[str, list[int]] = {}
        self._note("as traced", "The model as it was captured.", "exact", program)

    def after(self, one: Pass, program: Program) -> None:
        """Note what a pass made."""
        about = describe(type(one))
        self._note(about.name, about.does, about.numerics, program)

    def _note(self, name: str, does: str, numerics: str, program: Program) -> None:
        texts = {"": outer_text(program)} | {block: body_text(program, block) for block in program.blocks}
        found = {graph: [self._line(text) for text in lines.splitlines()] for graph, lines in texts.items()}
        changed = {graph: places for graph, places in found.items() if self._texts.get(graph) != places}
        gone = [graph for graph in self._texts if graph not in found]
        self.steps.append(PassStep(name, does, numerics, changed, gone))
        self._texts = found

    def _line(self, text: str) -> int:
        return self.lines.setdefault(text, len(self.lines))


def _stages_of(pipeline: Pipeline | None) -> dict[str, int] | None:
    """The stage of every outer node that one stage alone computes."""
    if pipeline is None:
        return None
    found: dict[str, list[int]] = {}
    for number, stage in enumerate(pipeline.cuts):
        received = {*stage.receives, *stage.carried_in}
        for node in stage.program.graph.nodes:
            if node.name not in received and node.op == "call_function":
                found.setdefault(node.name, []).append(number)
    return {name: numbers[0] for name, numbers in found.items() if len(numbers) == 1}


def _stage_views(pipeline: Pipeline | None) -> Iterator[StageView]:
    for number, stage in enumerate(pipeline.cuts if pipeline is not None else ()):
        assert pipeline is not None
        sends, carried_out = (stage.passed(names, pipeline.virtual) for names in (stage.sends, stage.carried_out))
        yield StageView(number, pipeline.coordinates[number], *stage.counts(), sends, carried_out)


def _facts(parallel: ParallelProgram, report: Report, total: float) -> Iterator[Figure]:
    flops = max(report.flops_total, 1)
    yield Figure("ranks", str(parallel.world_size))
    yield Figure("a forward", _work(flops))
    yield Figure("slowest rank", f"{report.share:.1%}", "of that")
    yield Figure("all ranks", f"{sum(report.flops_per_rank) / flops:.1%}", "of that")
    yield Figure("sent by a rank", _size(sum(one.bytes_per_rank for one in report.collectives)))
    yield Figure("weights a rank", _size(max(report.weight_bytes_per_rank)))
    yield Figure("memory a rank", _size(max(one.total for one in report.memory)), "estimate, with weights")
    if any(report.buffer_bytes_per_rank):
        most, full = max(report.buffer_bytes_per_rank), max(report.full_buffer_bytes_per_rank)
        yield Figure("buffers a rank", _size(most), "" if most == full else f"{_size(full)} in the model's dtype")
    yield Figure("schedule", f"{total / 1000:.3g} ms", "estimate")


def _tables(report: Report) -> Iterator[Rows]:
    sent = [[c.kind, c.mesh_dim, str(c.count), _size(c.bytes_per_rank)] for c in report.collectives]
    head = ["collective", "mesh dim", "times", "sent by the busiest rank"]
    yield Rows("Communication in a forward", head, sent, "nothing is sent")
    flops = max(report.flops_total, 1)
    ranks = [
        [str(rank), _work(work), f"{work / flops:.2%}", _size(weights), *_buffers(report, rank)]
        for rank, (work, weights) in enumerate(zip(report.flops_per_rank, report.weight_bytes_per_rank, strict=True))
    ]
    yield Rows("Ranks", ["rank", "work", "of one device", "weights", "buffers"], ranks)
    yield Rows("Ranks that idle", ["which"], [[str(one)] for one in report.idle], "none")
    regions = [[one.name, _work(one.flops_total), f"{one.share:.2%}"] for one in report.regions]
    yield Rows("Regions of the model", ["region", "work", "of that the slowest rank"], regions)
    fallbacks = [[f.op, f.place, report.reason(f), _size(f.bytes)] for f in report.fallbacks]
    none = "no operator needed a divided dimension whole"
    yield Rows("Fallbacks: where something was gathered", ["operator", "place", "reason", "sent"], fallbacks, none)
    reads = [[read] for read in report.reads]
    yield Rows("Read from new inputs at every call", ["input and reason"], reads, "nothing")


def _buffers(report: Report, rank: int) -> Sequence[str]:
    return [_size(report.buffer_bytes_per_rank[rank]) if report.buffer_bytes_per_rank else "none"]


def _size(count: int) -> str:
    return _scaled(count, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}, 3)


def _work(flops: int) -> str:
    return _scaled(flops, {"TFLOP": 10**12, "GFLOP": 10**9, "MFLOP": 10**6, "FLOP": 1}, 4)


def _scaled(count: int, units: Mapping[str, int], digits: int) -> str:
    """For people: in the first unit that it reaches, or as it is in the last one."""
    *larger, (least, _) = units.items()
    scaled = (f"{count / size:.{digits}g} {unit}" for unit, size in larger if count >= size)
    return next(scaled, f"{count} {least}")

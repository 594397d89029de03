"""What an inspection says is what the program, the report and the schedule are."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree

import networkx
import pytest
import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.inspection import WRITERS, Inspection, inspect
from xdit_ir.inspection.folded import folded
from xdit_ir.inspection.model import GraphView
from xdit_ir.inspection.svg import svg_text
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import body_text, outer_text
from xdit_ir.planning.durations import Durations
from xdit_ir.planning.hardware import Hardware
from xdit_ir.planning.schedule import Clock, RankGroup, _run, tasks, timeline
from xdit_ir.planning.spans import Span
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.report import traffic
from xdit_ir.text import difference, parse, write

NAME = "flux.1-dev:tiny"
USP = {"ulysses": 2, "ring": 2}


@pytest.fixture(scope="module")
def traced() -> TracedProgram:
    return xir.trace(*models.load(NAME))


@pytest.fixture(scope="module")
def usp(traced: TracedProgram) -> Inspection:
    return inspect(traced, NAME, **USP)


@pytest.fixture(scope="module")
def stages(traced: TracedProgram) -> Inspection:
    return inspect(traced, NAME, pipefusion=2)


def is_acyclic(view: GraphView) -> bool:
    both = [[(edge.source, edge.target) for edge in view.edges], list(folded(view).edges)]
    return all(networkx.is_directed_acyclic_graph(networkx.DiGraph(edges)) for edges in both)


def test_the_picture_has_every_call_and_every_operator_once(traced: TracedProgram, usp: Inspection) -> None:
    assert usp.after is not None
    program = traced.parallelize(**USP).ir
    for view, shown in ((usp.before, traced.ir), (usp.after, program)):
        assert is_acyclic(view)
        calls = [box.title for box in view.boxes if box.kind == "call"]
        assert calls == [str(node.args[1]) for node in shown.calls]
        names = [line.name for box in view.boxes if box.kind != "output" for line in box.lines]
        values = {n.name for n in shown.graph.nodes if n.op in ("placeholder", "call_function")}
        assert sorted(names) == sorted(values - {node.name for node in shown.calls})
    assert len([box for box in usp.after.boxes if box.kind == "operators"]) < 10, "too many to see at a glance"


def test_layers_in_a_row_are_one_run(usp: Inspection) -> None:
    boxes = folded(usp.before).boxes.values()
    runs = {calls[0].block: len(calls) for calls in boxes if calls[0].kind == "call"}
    assert runs == {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}


def test_skip_connections_split_a_run() -> None:
    """U-shaped: what passes by a layer through something else keeps layers apart; the picture stays acyclic."""
    view = inspect(xir.trace(*models.load("plain-uvit:tiny")), "u").before
    assert is_acyclic(view)


def test_bytes_are_those_of_the_report(traced: TracedProgram, usp: Inspection) -> None:
    report = traced.parallelize(**USP).report()
    expected = sum(one.bytes_per_rank for one in report.collectives)
    assert usp.after is not None and usp.timeline is not None
    inside = [line.exchange.bytes * b.calls for b in usp.after.bodies.values() for line in b.lines if line.exchange]
    around = [
        line.exchange.bytes for box in usp.after.boxes if box.kind == "operators" for line in box.lines if line.exchange
    ]
    assert sum(inside) + sum(around) == expected
    for rank in range(4):
        assert sum(span.bytes for span in usp.timeline.spans if span.rank == rank) == expected
    attention = [line for line in usp.after.bodies["FluxTransformerBlock"].lines if line.op == "ring_attention"]
    assert "scaled_dot_product_attention" in attention[0].source


def test_bytes_of_uneven_ranks_are_those_of_each_rank() -> None:
    """The report names the busiest rank of each kind of communication, which need not be the same one for all."""
    traced = xir.trace(*models.load("dual-transformer:tiny"))
    for degrees in ({"ulysses": 3}, {"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}):
        parallel = traced.parallelize(**degrees)
        calls = [str(node.args[0]) for node in parallel.ir.calls]
        graphs = [parallel.ir.graph, *(parallel.ir.blocks[name].graph for name in calls)]
        found = [one for graph in graphs for node in graph.nodes if (one := traffic(node, parallel.mesh)) is not None]
        spans = timeline(parallel).spans
        for rank in range(parallel.world_size):
            sent = sum(amounts[rank] for _, amounts in found)
            assert sum(span.bytes for span in spans if span.rank == rank) == sent, (degrees, rank)
        for one in parallel.report().collectives:
            same = [amounts for key, amounts in found if key == (one.kind, one.mesh_dim)]
            assert one.count == len(same)
            assert one.bytes_per_rank == max(map(sum, zip(*same, strict=True)))


def test_passes_lead_from_the_first_text_to_the_last(traced: TracedProgram, usp: Inspection) -> None:
    texts: dict[str, list[str]] = {}
    for step in usp.passes:
        for name in step.gone:
            del texts[name]
        texts |= {name: [usp.lines[place] for place in places] for name, places in step.graphs.items()}
        if step.name == "as traced":
            assert texts[""] == outer_text(traced.ir).splitlines()
    program = traced.parallelize(**USP).ir
    assert texts[""] == outer_text(program).splitlines()
    assert {name: lines for name, lines in texts.items() if name} == {
        name: body_text(program, name).splitlines() for name in program.blocks
    }
    changed = {step.name: bool(step.graphs) for step in usp.passes}
    assert changed["shard-tokens"] and changed["lower-attention"] and not changed["split-batch"]


def lanes(inspection: Inspection) -> list[list[Span]]:
    assert inspection.timeline is not None
    ranks = range(len(inspection.timeline.busy))
    keys = [(rank, lane) for rank in ranks for lane in ("compute", "link")]
    return [[s for s in inspection.timeline.spans if (s.rank, s.lane) == key] for key in keys]


def test_nothing_does_two_things_at_once(usp: Inspection, stages: Inspection) -> None:
    for inspection in (usp, stages):
        for spans in lanes(inspection):
            ordered = sorted((s for s in spans if s.kind != "ring_attention"), key=lambda span: span.start)
            assert all(b.start >= a.end - 0.02 for a, b in itertools.pairwise(ordered))


def test_the_pipeline_fills(traced: TracedProgram) -> None:
    """A patch is in stage 1 after stage 0 has sent it, while stage 0 computes the next one."""
    fast_links = Machine(bytes=1e15, latency=0.0)
    spans = timeline(traced.parallelize(pipefusion=2), fast_links).spans
    computes = [span for span in spans if span.lane == "compute" and span.step == 1]

    def when(stage: int, patch: int) -> tuple[float, float]:
        own = [span for span in computes if (span.stage, span.patch) == (stage, patch)]
        return min(span.start for span in own), max(span.end for span in own)

    assert when(0, 0)[1] <= when(1, 0)[0] + 0.02
    assert when(1, 0)[0] < when(0, 1)[1] <= when(1, 1)[0] + 0.02
    warmup = [span for span in spans if span.lane == "compute" and span.step == 0]
    first, second = ([span for span in warmup if span.stage == stage] for stage in (0, 1))
    assert max(span.end for span in first) <= min(span.start for span in second) + 0.02


OVERLAPPED = """
program Overlapped on ulysses=2 {
  input %x: f32[8, 4]
  %cut: f32[8/ulysses, 4] = shard(%x)
  %first: f32[8/ulysses, 4] = linear(%cut, @w)
  %whole: f32[8, 4] = gather(%first)
  %other: f32[8/ulysses, 4] = linear(%cut, @w)
  %last: f32[8, 4] = linear(%whole, @w)
  return %last
}

weights {
  w: f32[4, 4]
}
"""


def test_an_exchange_runs_beside_work_and_is_awaited_by_its_first_user() -> None:
    """By hand: a linear of 4 rows is 128 FLOP, so 1 s each; the gather sends 64 bytes in 1.5 s, half a second late."""
    program, mesh = parse(OVERLAPPED), Mesh.of(ulysses=2)
    machine = Machine(flops=128, bytes=64, memory=1e12, latency=0.5)
    clocks = [Clock(), Clock()]
    _run(list(tasks(program, None)), RankGroup((0, 1), (0, 1), mesh), Durations(mesh, Hardware.plain(machine)), clocks)
    for clock in clocks:
        assert [(s.lane, s.start, s.end) for s in clock.spans] == [
            ("compute", 0.0, 2.0),
            ("link", 1.0, 2.5),
            ("compute", 2.5, 4.5),
        ]


def test_schedule_and_work_agree(traced: TracedProgram) -> None:
    parallel: ParallelProgram = traced.parallelize(ulysses=2)
    slow = Machine(flops=1e6, bytes=1e18, memory=1e18, latency=0.0)
    found = timeline(parallel, slow)
    assert found.total / 1e6 == pytest.approx(max(parallel.report().flops_per_rank) / 1e6, rel=1e-3)
    assert found.busy == pytest.approx([1.0, 1.0], abs=1e-3)


def test_folded_stages_take_turns(traced: TracedProgram) -> None:
    """There and back again: each rank has two stages, and what it computes is in the order of the turns."""
    folded_twice = inspect(traced, NAME, pipefusion=2, stages=(1, 1, 1, 1))
    assert [stage.place for stage in folded_twice.stages] == [0, 1, 1, 0]
    assert any(stage.carried_out for stage in folded_twice.stages)
    pipeline = traced.parallelize(pipefusion=2, stages=(1, 1, 1, 1)).pipeline
    assert pipeline is not None and folded_twice.timeline is not None
    again = parse(write(pipeline.program).text)
    assert difference(pipeline.program, again) is None and again.coordinates == (0, 1, 1, 0)
    for rank in range(2):
        own = [s for s in folded_twice.timeline.spans if (s.rank, s.lane) == (rank, "compute") and s.step > 0]
        turns = [
            pipeline.issue_order(span.stage, span.step, span.patch) for span in sorted(own, key=lambda span: span.start)
        ]
        assert turns == sorted(turns)


def test_stages_are_seen(stages: Inspection) -> None:
    assert stages.after is not None
    assert {box.stage for box in stages.after.boxes if box.kind == "call"} == {0, 1}
    assert [stage.number for stage in stages.stages] == [0, 1]
    assert stages.stages[0].sends and not stages.stages[1].sends
    kinds = {line.exchange.kind for b in stages.after.bodies.values() for line in b.lines if line.exchange}
    assert kinds == {"buffer"}, "patches meet in buffers; nothing is sent inside a block"


def test_drawings(usp: Inspection, stages: Inspection) -> None:
    for inspection in (usp, stages):
        texts = {name: writer(inspection) for name, writer in WRITERS.items()}
        drawing = ElementTree.fromstring(texts["svg"])
        boxes = folded(inspection.after or inspection.before).boxes
        assert len(drawing.findall("{*}rect")) == len(boxes) == texts["dot"].count("label=")
        assert json.loads(texts["json"])["degrees"] == inspection.degrees
        events = json.loads(texts["trace"])["traceEvents"]
        assert inspection.timeline is not None
        assert sum(event["ph"] == "X" for event in events) == len(inspection.timeline.spans)


def test_without_degrees_there_is_the_program_alone(traced: TracedProgram) -> None:
    alone = inspect(traced, NAME)
    assert alone.after is None and alone.timeline is None and alone.before.boxes
    assert "<svg" in svg_text(alone)
    with pytest.raises(xir.XditError, match="give a degree, such as --ulysses 2"):
        WRITERS["trace"](alone)


def test_the_page_is_whole_and_holds_the_data(usp: Inspection) -> None:
    page = WRITERS["html"](usp)
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == json.loads(WRITERS["json"](usp))
    assert "src=" not in page.replace(data, "") and 'href="style' not in page, "a part was not put in"
    assert "Permission is hereby granted" in page, "the licence of the graph library goes with it"
    assert torch.__version__ not in data

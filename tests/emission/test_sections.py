"""A forward in sections: together they compute what it computes, whoever runs which node."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

import xdit_ir as xir
from xdit_ir import capture, models
from xdit_ir.capture.inputs import split_example
from xdit_ir.emission import trial
from xdit_ir.emission.codegen import Code, generate
from xdit_ir.emission.recording import Recording
from xdit_ir.emission.sections import RunBy, cut_sections, insert_moves
from xdit_ir.emission.state import WeightReferences
from xdit_ir.ir.graphs import placeholders, results_of
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.order import rank_passes
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.uploads import StartUpload

NAMES = ["plain-mmdit:tiny", "wan2.1-t2v-1.3b:tiny", "hidream-i1:tiny"]


@pytest.fixture(scope="module", params=NAMES)
def forward(request: pytest.FixtureRequest) -> tuple[Code, list[torch.Tensor]]:
    """The code of a model on one rank, and what it takes."""
    model, example = models.load(request.param, seed=0)
    program = run_passes(xir.trace(model, example).parallelize().rank(0), rank_passes(None, compiled=True))
    cpu = torch.device("cpu")
    code = generate(program, Communicator(Mesh.of(), cpu), cpu)
    args, kwargs = split_example(example)
    inputs = capture.bind_inputs(model, program, args, kwargs)
    weights = WeightReferences(model, code.weights, program.state, cpu).fetch()
    return code, [*inputs, *weights, *code.constant_tensors(cpu)]


@pytest.mark.parametrize("seed", range(6))
def test_sections_in_a_row_compute_what_the_forward_computes(
    forward: tuple[Code, list[torch.Tensor]], seed: int
) -> None:
    code, tensors = forward
    draw = random.Random(seed)
    kinds = {}
    for node in code.run.graph.nodes:
        if node.op not in ("placeholder", "output"):
            picked = node.target.__name__ == "getitem" if node.op == "call_function" else False
            kinds[node] = kinds[node.args[0]] if picked else draw.choice([RunBy.HOST, RunBy.DEVICE, RunBy.DEVICE])
    values = dict(zip((node.name for node in placeholders(code.run.graph)), tensors, strict=True))
    with torch.no_grad():
        want = code(tensors)
        for section in cut_sections(code.run, kinds):
            values |= zip(section.gives, section.module(*(values[name] for name in section.takes)), strict=True)
    for node, expected in zip(results_of(code.run.graph), want, strict=True):
        assert torch.equal(values[node.name], expected)


def test_uploads_are_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that reads the host's memory, these copies alone need nobody there. Here a meta tensor is the device's."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    parallel = xir.trace(layers, (torch.zeros(2, 8),)).parallelize(stream_weights=True)
    code = generate(parallel.rank(0), Communicator(Mesh.of(), torch.device("cpu")), torch.device("cpu"))
    monkeypatch.setattr(trial, "_waiting_is_an_error", contextlib.nullcontext)
    monkeypatch.setattr(StartUpload, "forward", lambda self, x: (x.to("meta"), None))
    parts = [torch.zeros(parallel.ir.stored[name].spec.shape, dtype=torch.uint8) for name in code.weights]
    found = trial.Trial(code.run, code.unchanging)
    found.run(torch.zeros(2, 8, device="meta"), *parts)
    assert {*found.kinds()[1].values()} == {RunBy.DEVICE} and parts


def test_a_recording_of_what_the_host_runs(
    forward: tuple[Code, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are looked up again at each call, and whatever lies otherwise in memory is recorded anew."""
    code, tensors = forward
    begins = len(tensors) - len(code.weights) - len(code.constant_tensors(torch.device("cpu")))
    work = [node for node in code.run.graph.nodes if node.op not in ("placeholder", "output")]
    monkeypatch.setattr(Recording, "_try", lambda *_: cut_sections(code.run, dict.fromkeys(work, RunBy.HOST)))
    recorded = Recording(code, SimpleNamespace(aside=contextlib.nullcontext))  # type: ignore[arg-type]
    weights = [x.clone() for x in tensors[begins:]]
    with torch.no_grad():
        for factor in (1.0, 1.0, 0.5):
            inputs = [x * factor if x.is_floating_point() else x for x in tensors[:begins]]
            for found, wanted in zip(recorded(inputs, weights), code([*inputs, *weights]), strict=True):
                assert torch.equal(found, wanted)
            weights[0].mul_(1.1)
    addresses = recorded._addresses
    square = next(place for place, x in enumerate(weights) if x.dim() == 2)
    weights[square].data = weights[square].t().contiguous().t()
    recorded(tensors[:begins], weights)
    assert recorded._addresses != addresses


def test_a_first_call_that_only_runs_is_recorded_at_the_next(
    forward: tuple[Code, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shape that comes once nothing is recorded; what the first call computes is what it gives."""
    code, tensors = forward
    begins = len(tensors) - len(code.weights) - len(code.constant_tensors(torch.device("cpu")))
    inputs, state = tensors[:begins], tensors[begins:]
    work = [node for node in code.run.graph.nodes if node.op not in ("placeholder", "output")]
    runs: list[str] = []
    plain = code.run.forward
    monkeypatch.setattr(code.run, "forward", lambda *given: (runs.append("whole"), plain(*given))[1])
    kinds = dict.fromkeys(work, RunBy.HOST)
    seen = SimpleNamespace(run=lambda *_: runs.append("trial"), kinds=lambda: (code.run, kinds))
    monkeypatch.setattr("xdit_ir.emission.recording.Trial", lambda *_: seen)
    with torch.no_grad():
        want = plain(*tensors)
        for at_once, expected in ((False, [["whole"], ["trial"], []]), (True, [["whole", "trial"], [], []])):
            pool = SimpleNamespace(aside=contextlib.nullcontext)
            recorded = Recording(code, pool, at_once=at_once)  # type: ignore[arg-type]
            for now in expected:
                runs.clear()
                assert all(map(torch.equal, recorded(inputs, state), want))
                assert runs == now
                assert ("next call" in str(recorded)) == (now == ["whole"])


def test_a_moved_operand_is_a_node_that_can_be_written_as_code() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.neg.default, (x,))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, y)),))
    run = fx.GraphModule({}, graph)
    made, copies, moves = insert_moves(run, [(y, x)], torch.device("meta"))
    assert "_to_copy" in made.code
    [(move, source)] = moves.items()
    assert source is copies[x] and copies[y].args == (move,)


def graph_of(text: str) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A graph of calls: `d = f(a, b)` by lines; who runs a node is said by the first letter of its name."""
    graph = fx.Graph()
    named = {name: graph.placeholder(name) for name in ("x", "y")}
    for line in text.split():
        name, _, given = line.partition("=")
        args = tuple(named[arg] for arg in given.split(","))
        named[name] = graph.create_node("call_function", torch.add if len(args) > 1 else torch.neg, args, name=name)
    graph.output((named[name],))
    return fx.GraphModule({}, graph), named


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("d1=x d2=d1", ["d1 d2"]),
        ("d1=x h1=y d2=d1,h1", ["h1", "d1 d2"]),
        ("d1=x h1=d1 d2=h1", ["d1", "h1", "d2"]),
        ("d1=x h1=y o1=y h2=d1 d2=o1,h1 d3=d2,h2", ["o1", "h1", "d1", "h2", "d2 d3"]),
    ],
)
def test_the_host_comes_first_where_it_can_and_all_else_stays_in_its_order(text: str, found: list[str]) -> None:
    run, named = graph_of(text)
    letters = {"d": RunBy.DEVICE, "h": RunBy.HOST, "o": RunBy.ONCE}
    kinds = {node: letters[name[0]] for name, node in named.items() if name[0] in letters}
    sections = cut_sections(run, kinds)
    names = [" ".join(n.name for n in one.module.graph.nodes if n.op == "call_function") for one in sections]
    assert names == found
    assert [one.kind for one in sections] == [letters[name[0]] for name in names]

"""Tables on another device than the model's become constants, as they are needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

import xdit_ir as xir
from xdit_ir import capture, models
from xdit_ir.capture.inputs import split_example
from xdit_ir.emission.codegen import generate
from xdit_ir.emission.fold import fold_constants
from xdit_ir.ir.collective_ops import Communicate
from xdit_ir.ir.graphs import all_graphs, copy_graph
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.named_tensors import find_tensor
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.planning import hardware
from xdit_ir.sharding.verify import verify
from xdit_ir.transport.distributed import Communicator

CPU = torch.device("cpu")
ELSEWHERE = torch.device("cuda", 0)  # so that all that names the CPU is on another device


def outputs(program: Program, model: torch.nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(Interpreter(program, model_state(program, model), torch.device("cpu")).run(inputs))


def factories(program: Program) -> int:
    return sum("arange" in str(node.target) for _, graph, _ in all_graphs(program) for node in graph.nodes)


@pytest.mark.parametrize("name", ["cogview4-6b:tiny", "flux.1-dev:tiny"])
def test_what_a_model_computes_on_the_cpu_from_nothing_is_computed_once(name: str) -> None:
    model, example = models.load(name, seed=0)
    program = xir.trace(model, example).ir
    inputs = capture.bind_inputs(model, program, *split_example(example))
    folded = fold_constants(program.replace(device=ELSEWHERE)).replace(device=program.device)
    verify(folded)
    assert factories(program) > 0 and factories(folded) == 0
    for got, want in zip(outputs(folded, model, inputs), outputs(program, model, inputs), strict=True):
        assert torch.equal(got, want)


def test_tables_that_all_calls_of_a_block_are_given_are_named_in_it() -> None:
    model, example = models.load("cogview4-6b:tiny", seed=0)
    program = xir.trace(model, example).ir
    folded = fold_constants(program.replace(device=ELSEWHERE))
    before = {name: len(next(c for c in program.calls if c.args[0] == name).args[2]) for name in program.blocks}
    after = {name: len(next(c for c in folded.calls if c.args[0] == name).args[2]) for name in folded.blocks}
    assert all(after[name] < before[name] for name in before)


def test_code_takes_constants_that_only_blocks_read() -> None:
    model, example = models.load("joyimage-edit:tiny", seed=0)
    program = xir.trace(model, example).ir
    folded = fold_constants(program.replace(device=ELSEWHERE)).replace(device=CPU)
    outer = {node.target for node in folded.graph.nodes}
    code = generate(folded, Communicator(Mesh.of(), CPU), CPU)
    assert not outer.issuperset(code.constants)
    inputs = capture.bind_inputs(model, program, *split_example(example))
    weights = [find_tensor(model, name) for name in code.weights]
    with torch.no_grad():
        got = code([*inputs, *weights, *code.constant_tensors(CPU)])
    for one, want in zip(got, outputs(program, model, inputs), strict=True):
        assert torch.allclose(one, want, atol=1e-5)


def test_on_the_models_own_device_nothing_changes() -> None:
    program = xir.trace(*models.load("cogview4-6b:tiny")).ir
    assert fold_constants(program) is program


@pytest.mark.parametrize("name", ["cogview4-6b:tiny", "lumina-2:tiny"])
def test_a_rank_computes_its_part_of_them_once(name: str) -> None:
    parallel = xir.trace(*models.load(name, seed=0)).parallelize(ulysses=2)
    ranks = [parallel.rank(rank) for rank in range(2)]
    assert all(map(factories, ranks))
    folded = [fold_constants(rank.replace(device=ELSEWHERE)) for rank in ranks]
    assert not any(map(factories, folded))
    tables = [[x for name, x in one.constants.items() if name not in parallel.ir.constants] for one in folded]
    assert any(not torch.equal(one, other) for one, other in zip(*tables, strict=True))


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + self.up(x) * table.to(x.device, x.dtype)


class Alternating(nn.Module):
    """Layers that are given one of two tables in turn, which are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Turned() for _ in range(4))
        self.tables = [torch.linspace(0, 1, 8, dtype=torch.float64), torch.linspace(1, 2, 8, dtype=torch.float64)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x, self.tables[place % 2])
        return x


def test_each_call_of_a_block_is_given_its_own_table_where_the_block_would_move_it() -> None:
    torch.manual_seed(0)
    model, x = Alternating(), torch.randn(2, 4, 8)
    program = xir.trace(model, (x,)).ir
    folded = fold_constants(program.replace(device=ELSEWHERE)).replace(device=program.device)
    verify(folded)
    given = {str(call.args[2][-1].target) for call in folded.calls}
    assert len(given) == 2 and all(name.endswith("_moved") for name in given)
    assert torch.equal(outputs(folded, model, [x])[0], model(x))


def test_exchanges_stay_that_a_rank_needs_nothing_of() -> None:
    traced = xir.trace(*models.load("anyflow-14b:tiny"))
    program = traced.parallelize(ulysses=2, machine=hardware.load("h200").prices).rank(1)

    def exchanges(one: Program) -> list[str]:
        graphs = (graph for _, graph, _ in all_graphs(one))
        return [node.name for graph in graphs for node in graph.nodes if isinstance(node.target, Communicate)]

    blocks = {name: replace(block, graph=with_a_table(block.graph)) for name, block in program.blocks.items()}
    folded = fold_constants(program.replace(blocks=blocks, device=ELSEWHERE))
    assert folded.constants.keys() > program.constants.keys(), "something was folded"
    assert exchanges(folded) == exchanges(program)


def with_a_table(source: fx.Graph) -> fx.Graph:
    """A copy that makes a table on another device, and adds it to something."""
    graph = copy_graph(source)
    [value, *_] = graph.find_nodes(op="placeholder")
    with graph.inserting_before(graph.output_node()):
        table = graph.call_function(torch.ops.aten.arange.default, (1,), {"dtype": torch.float32, "device": CPU})
        total = graph.call_function(torch.ops.aten.add.Tensor, (value, table))
    table.meta[SPEC] = TensorSpec((1,), torch.float32)
    total.meta[SPEC] = value.meta[SPEC]
    return graph

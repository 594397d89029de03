"""Tables on another device than the model's become constants, as they are needed."""

from __future__ import annotations

import pytest
import torch

import xdit_ir as xir
from xdit_ir import capture, models
from xdit_ir.capture.inputs import split_example
from xdit_ir.emission.codegen import generate
from xdit_ir.emission.fold import fold_constants
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.named_tensors import find_tensor
from xdit_ir.ir.program import Program
from xdit_ir.sharding.verify import verify
from xdit_ir.transport.distributed import Communicator

CPU = torch.device("cpu")


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
    elsewhere = program.replace(device=torch.device("cuda", 0))  # so that all that names the CPU is on another device
    folded = fold_constants(elsewhere).replace(device=program.device)
    verify(folded)
    assert factories(program) > 0 and factories(folded) == 0
    for got, want in zip(outputs(folded, model, inputs), outputs(program, model, inputs), strict=True):
        assert torch.equal(got, want)


def test_tables_that_all_calls_of_a_block_are_given_are_named_in_it() -> None:
    model, example = models.load("cogview4-6b:tiny", seed=0)
    program = xir.trace(model, example).ir
    folded = fold_constants(program.replace(device=torch.device("cuda", 0)))
    before = {name: len(next(c for c in program.calls if c.args[0] == name).args[2]) for name in program.blocks}
    after = {name: len(next(c for c in folded.calls if c.args[0] == name).args[2]) for name in folded.blocks}
    assert all(after[name] < before[name] for name in before)


def test_code_takes_constants_that_only_blocks_read() -> None:
    model, example = models.load("joyimage-edit:tiny", seed=0)
    program = xir.trace(model, example).ir
    folded = fold_constants(program.replace(device=torch.device("cuda", 0))).replace(device=CPU)
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

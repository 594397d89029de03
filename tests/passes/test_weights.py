"""Weights are values: a rank may hold a part of one, and gather it in front of the call, or of the call before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import xdit_ir as xir
from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_graph
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import LAYOUT, SPEC, Program, call_parts
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.overlap import Overlap
from xdit_ir.sharding.report import make_report
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.sharding.verify import verify
from xdit_ir.simulation.lockstep import run_ranks
from xdit_ir.text import equal, parse, write

MESH = Mesh.of(ulysses=2)
X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def gathered(program: Program, name: str) -> Program:
    """Every layer's weight of this name in parts, gathered in front of its call."""
    graph = copy_graph(program.graph)
    for call in [node for node in graph.nodes if node.name.startswith("layers_") and call_weights(node, name)]:
        weight = call_parts(call).weights[name]
        part = weight.meta[LAYOUT].with_dims({0: MESH.divide(weight.meta[SPEC].shape[0], ("ulysses",))})
        with graph.inserting_before(call):
            for target, layout in ((ops.shard, part), (ops.gather, weight.meta[LAYOUT])):
                weight = graph.call_function(target, (weight,))
                weight.meta = {SPEC: call_parts(call).weights[name].meta[SPEC], LAYOUT: layout}
        call.replace_input_with(call_parts(call).weights[name], weight)
    return program.replace(graph=graph)


def call_weights(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and len(node.args) == 4 and name in call_parts(node).weights


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return gathered(xir.trace(model, (X,)).parallelize(ulysses=2).ir, "out.weight")


def test_it_is_verified_and_printed(program: Program, golden: Callable[[str, str], None]) -> None:
    verify(program, runnable=True)
    golden("gathered_weight", program_text(program))
    assert equal(parse(write(program).text), program)


def test_every_rank_computes_what_the_model_does(program: Program, model: nn.Module) -> None:
    ranks = [Specialize(rank).apply(program) for rank in range(2)]
    with torch.no_grad():
        for (found,) in run_ranks(ranks, model_state(program, model), [X], torch.device("cpu")):
            torch.testing.assert_close(found, model(X))


def test_its_gathers_are_priced(program: Program) -> None:
    found = {one.kind: one for one in make_report(program, program).collectives}
    assert found["gather"].count == 3 + 1  # and the output
    assert found["gather"].bytes_per_rank == 3 * 8 * 8 * 4 // 2 + X.numel() * 4 // 2


def test_they_start_before_the_calls_that_they_do_not_need(program: Program) -> None:
    ahead = run_passes(program, [Overlap(MESH)])
    order = [node.name for node in ahead.graph.nodes if node.op == "call_function"]
    gathers = [name for name in order if name.startswith("gather")]
    assert len(gathers) == 3
    assert all(order.index(name) < order.index("layers_0") for name in gathers)


def test_a_weight_in_another_layout_is_refused(program: Program) -> None:
    broken = program.replace(graph=copy_graph(program.graph))
    call = next(broken.calls)
    weight = call_parts(call).weights["out.weight"]
    call.replace_input_with(weight, weight.args[0])  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match=r"argument out_weight of Layer has another type"):
        verify(broken)

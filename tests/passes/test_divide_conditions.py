"""Blocks modulated by a condition: its projections are made before the blocks, each rank its part of the features."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.graphs import weights_of
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.divide_conditions import DivideConditions
from xdit_ir.passes.find_tokens import FindTokens
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.passes.order import token_passes
from xdit_ir.passes.split_batch import SplitBatch
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.simulation.lockstep import run_ranks

# Weights are read slowly, so that they count in a small model.
SLOW = Machine(memory=1e3)
WIDTH, BATCH = 6, 2


class Layer(nn.Module):
    """adaLN from a condition; `depth` more linear layers before the modulation; a projection of the tokens."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.deep = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.modulation, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        hidden = F.silu(condition)
        for layer in self.deep:
            hidden = F.silu(layer(hidden))
        scale, shift = self.modulation(hidden)[:, None].chunk(2, -1)
        q, k, v = self.qkv(x * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.gate(hidden)[:, None] * mixed


class Model(nn.Module):
    def __init__(self, depth: int = 0) -> None:
        super().__init__()
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(depth) for _ in range(3))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        condition = self.condition(condition)
        for layer in self.layers:
            x = layer(x, condition)
        return x


EXAMPLE = {"x": torch.randn(BATCH, 16, WIDTH), "condition": torch.randn(BATCH, WIDTH)}


def lowered(model: nn.Module, mesh: Mesh) -> Program:
    traced = xir.trace(model, EXAMPLE).ir
    return run_passes(
        traced,
        [Canonicalize(), FindTokens(), SplitBatch(mesh), *token_passes(mesh), LowerAttention(mesh), SplitStatistics()],
    )


def test_one_exchange_for_all_layers(golden: Callable[[str, str], None]) -> None:
    mesh = Mesh.of(ulysses=2)
    divided = run_passes(lowered(Model(), mesh), [DivideConditions(mesh, SLOW)])
    golden("divide_conditions", program_text(divided))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "mesh", [Mesh.of(ulysses=2), Mesh.of(ring=3), Mesh.of(cfg=2), Mesh.of(cfg=2, ring=2, ulysses=2)], ids=str
)
def test_equal_on_every_rank(mesh: Mesh, depth: int) -> None:
    model = Model(depth).eval()
    before = lowered(model, mesh)
    after = run_passes(before, [DivideConditions(mesh, SLOW)])
    assert set(after.blocks) == {*before.blocks, "Layer_conditions"}
    ranks = [Specialize(rank).apply(after) for rank in range(mesh.world_size)]
    with torch.no_grad():
        wanted = model(**EXAMPLE)
        state = model_state(after, model)
        for (found,) in run_ranks(ranks, state, list(EXAMPLE.values()), torch.device("cpu")):
            torch.testing.assert_close(found, wanted)


def test_left_where_reading_weights_costs_less_than_an_exchange() -> None:
    mesh = Mesh.of(ulysses=2)
    before = lowered(Model(), mesh)
    assert DivideConditions(mesh).apply(before) is before


def test_projections_of_tokens_stay() -> None:
    mesh = Mesh.of(ulysses=2)
    after = run_passes(lowered(Model(), mesh), [DivideConditions(mesh, SLOW)])
    assert set(weights_of(after.blocks["Layer_conditions"].graph)) == {
        "modulation.weight",
        "modulation.bias",
        "gate.weight",
    }


@pytest.mark.parametrize("ulysses", [1, 2])
def test_halves_that_run_different_calls_share_no_conditions(ulysses: int) -> None:
    """Each half has a condition of its own, so features that the other one makes are not its own."""
    traced = xir.trace(Model(), EXAMPLE)
    parallel = traced.parallelize(cfg=2, ulysses=ulysses, pair_calls=True, machine=SLOW)
    assert not any("cfg" in one.mesh_dim for one in parallel.report().collectives)
    assert any(name.endswith("_conditions") for name in parallel.ir.blocks) == (ulysses > 1)

"""Selections with constants become `take` and `put`, ranks keep their own, and nothing is gathered for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.ir import ops
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.take_known import TakeKnown
from xdit_ir.sharding.propagate import Propagation
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.simulation.lockstep import run_ranks


class Ragged(nn.Module):
    """Valid text in front, padding behind it; then everything back to where it was."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        valid, empty = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        packed = torch.cat([x[:, valid], x.index_select(1, empty)], 1) * 2
        result = torch.zeros_like(x)
        result[:, valid] = packed[:, : len(valid)]
        return result


class Added(nn.Module):
    """What a step embeds is added to some of the tokens, as rows and by an index for each element."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        valid, empty = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        x = x.index_add(1, valid, x[:, : len(valid)] * 2)
        return x.scatter_add(1, empty[None, :, None].expand(2, -1, 3), x[:, -len(empty) :])


class Repeated(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, mask.long()]


MASK = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)


def rewritten(model: nn.Module) -> Program:
    return run_passes(xir.trace(model, (torch.randn(2, 8, 3), MASK)).ir, [Canonicalize(), TakeKnown()])


def test_known_places() -> None:
    program = rewritten(Ragged())
    mesh = Mesh.of(ulysses=2)
    cut = Layout((None, mesh.divide(8, ("ulysses",)), None))
    attempt = Propagation(program, mesh).attempt({"x": (cut,)})
    moved = [step.target for step in attempt.draft.steps if step.relayout]
    assert set(moved) == {ops.shard, ops.gather} and moved.count(ops.gather) == 1, "the output is gathered, and it only"


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("model", [Ragged(), Added()], ids=["ragged", "added"])
def test_equal_on_every_rank(model: nn.Module, degree: int) -> None:
    x = torch.randn(2, 8, 3)
    mesh = Mesh.of(ulysses=degree)
    cut = Layout((None, mesh.divide(8, ("ulysses",)), None))
    program = Propagation(rewritten(model), mesh).run({"x": (cut,)}).replace(mesh=mesh)
    ranks = [Specialize(rank).apply(program) for rank in range(degree)]
    for (got,) in run_ranks(ranks, model_state(program, model), [x, MASK], torch.device("cpu")):
        assert torch.equal(got, model(x, MASK))


def test_places_that_repeat_stay_an_index() -> None:
    targets = [node.target for node in rewritten(Repeated()).graph.nodes]
    assert ops.take not in targets


class Scattered(nn.Module):
    """Everything in another order and back, then what a mask of rows and columns names."""

    def __init__(self) -> None:
        super().__init__()
        self.order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = self.order
        moved = x[:, torch.tensor(order)] * 2
        x = moved[:, torch.argsort(torch.tensor(order))] + x
        x[mask] = x[mask] * 3
        return x


@pytest.mark.parametrize("degree", [2, 3])
def test_an_order_and_its_inverse_cancel(degree: int) -> None:
    model, x = Scattered(), torch.randn(2, 200, 3)
    mask = torch.rand(2, 200) > 0.5
    program = run_passes(xir.trace(model, (x, mask)).ir, [Canonicalize(), TakeKnown()])
    mesh = Mesh.of(ulysses=degree)
    cut = Layout((None, mesh.divide(200, ("ulysses",)), None))
    divided = Propagation(program, mesh).run({"x": (cut,)}).replace(mesh=mesh)
    moved = [node.target for node in divided.graph.nodes if ops.is_relayout(node.target)]
    assert moved.count(ops.gather) == 1 and set(moved) == {ops.shard, ops.gather}, "the output is gathered, and it only"
    ranks = [Specialize(rank).apply(divided) for rank in range(degree)]
    want = model(x.clone(), mask)
    for (got,) in run_ranks(ranks, model_state(divided, model), [x, mask], torch.device("cpu")):
        assert torch.equal(got, want)

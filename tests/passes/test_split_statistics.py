"""Norms over divided tokens take statistics that ranks add up once, and stay equal; all others stay one operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.sharding.propagate import Propagation
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.sharding.verify import verify
from xdit_ir.simulation.lockstep import run_ranks

aten = torch.ops.aten
NORMS = {aten.group_norm.default, aten.instance_norm.default, aten.linalg_vector_norm.default}


class Norms(nn.Module):
    """Of values `[batch, 4, tokens]`."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4)
        nn.init.uniform_(self.group.weight, 1, 2)
        nn.init.uniform_(self.group.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.group(x))
        return x * x.norm(p=2, dim=-1, keepdim=True) / x.norm(dim=1, keepdim=True)


def divided(model: nn.Module, x: Tensor, mesh: Mesh, dim: int) -> Program:
    """The program whose input is divided along a dim, before statistics are split."""
    program = run_passes(xir.trace(model, (x,)).ir, [Canonicalize()])
    cut = Layout.whole(x.ndim).with_dims({dim: mesh.divide(x.shape[dim], ("ring", "ulysses"))})
    name = next(node.name for node in program.graph.nodes if node.op == "placeholder")
    return Propagation(program, mesh).run({name: (cut,)}).replace(mesh=mesh)


def rewritten(model: nn.Module, x: Tensor, mesh: Mesh, dim: int) -> Program:
    """The program that ranks can run, after they were compared with the model."""
    program = SplitStatistics().apply(divided(model, x, mesh, dim))
    verify(program, runnable=True)
    ranks = [Specialize(rank).apply(program) for rank in range(mesh.world_size)]
    short = x.dtype == torch.bfloat16
    for (got,) in run_ranks(ranks, model_state(program, model), [x], x.device):
        torch.testing.assert_close(got, model(x), rtol=5e-2 if short else 1e-5, atol=0.1 if short else 1e-5)
        assert got.dtype == x.dtype
    return program


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_norms_over_divided_tokens_are_split() -> None:
    program = rewritten(Norms(), sample(2, 4, 6), Mesh.of(ulysses=2), 2)
    whole = [node for node in program.graph.nodes if node.target in NORMS]
    assert len(whole) == 1, "that over channels, of which a rank has all"


# A mean that is large beside the deviations would be lost in a difference of squares in single precision.
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_ranks_exchange_once_and_lose_nothing(offset: float) -> None:
    norm, x = nn.GroupNorm(2, 4), sample(2, 4, 50) + offset
    program = SplitStatistics().apply(divided(norm, x, Mesh.of(ulysses=3), 2))
    assert [node.target for node in program.graph.nodes if ops.communicates(node.target)] == [
        ops.all_reduce,
        ops.gather,
    ]
    ranks = [Specialize(rank).apply(program) for rank in range(3)]
    wanted = norm.double()(x.double())
    norm.float()
    error = (run_ranks(ranks, model_state(program, norm), [x], x.device)[0][0] - wanted).abs().max()
    assert error <= 1.5 * max((norm(x) - wanted).abs().max(), 1e-6), "no worse than the module"


@pytest.mark.parametrize("ring", [1, 2])
def test_uneven_and_empty_parts(ring: int) -> None:
    rewritten(Norms(), sample(2, 4, 5), Mesh.of(ulysses=3, ring=ring), 2)


def test_half_precision_is_accumulated_in_single() -> None:
    rewritten(Norms().bfloat16(), sample(2, 4, 6).bfloat16(), Mesh.of(ulysses=2), 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_norms_whose_statistics_are_not_divided_stay_one_operator(dim: int) -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.instance_norm(nn.functional.group_norm(x, 2)) * x.norm(dim=-1, keepdim=True)

    program = rewritten(Apart(), sample(2, 4, 6), Mesh.of(ulysses=2), dim)
    assert {node.target for node in program.graph.nodes} >= NORMS
    assert not [node for node in program.graph.nodes if node.target is ops.all_reduce]


def test_a_norm_that_lacks_statistics_is_no_program_that_ranks_can_run() -> None:
    program = divided(nn.GroupNorm(2, 4), sample(2, 4, 6), Mesh.of(ulysses=2), 2)
    verify(program)
    with pytest.raises(VerifyError, match=r"its statistics are divided over \['ulysses'\]"):
        verify(program, runnable=True)


def test_a_program_without_divided_norms_is_handed_on() -> None:
    program = divided(Norms(), sample(2, 4, 6), Mesh.of(ulysses=2), 0)
    assert SplitStatistics().apply(program) is program


class Running(nn.Module):
    """A gated recurrence by sums that run along the tokens, there and back again."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sigmoid().log().cumsum(1)
        return (total.exp() * (x * (-total).exp()).cumsum(-2)).flip(1).cumsum(1)


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2, "ulysses": 2}, {"ulysses": 8}])
def test_sums_that_run_go_on_from_those_of_other_ranks(degrees: dict[str, int]) -> None:
    program = rewritten(Running(), sample(2, 7, 3), Mesh.of(**degrees), 1)
    sent = [node for node in program.graph.nodes if ops.communicates(node.target)]
    parts = [node for node in sent if node.args[0].target is ops.run_sums]
    assert len(parts) == 3 and len(sent) == 4, "three rows of sums, and the output"


def test_sums_of_samples_stay_one_operator() -> None:
    program = divided(Running(), torch.randn(2, 6, 3), Mesh.of(ulysses=2), 0)
    assert SplitStatistics().apply(program) is program

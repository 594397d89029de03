"""Norms over tokens become sums that ranks can share, and stay equal; norms over features stay one operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.split_statistics import SplitStatistics

Golden = Callable[[str, str], None]
aten = torch.ops.aten


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4)
        nn.init.uniform_(self.group.weight, 1, 2)
        nn.init.uniform_(self.group.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.group(x))
        return x * x.norm(p=2, dim=1, keepdim=True) / x.norm(dim=-1, keepdim=True)


class FeatureNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def rewritten(model: nn.Module, x: Tensor) -> Program:
    """The program, after it was compared with the model."""
    program = run_passes(xir.trace(model, (x,)).ir, [Canonicalize(), SplitStatistics()])
    (got,) = Interpreter(program, model_state(program, model), x.device).run([x])
    torch.testing.assert_close(
        got, model(x), rtol=1e-5 if x.dtype == torch.float32 else 5e-2, atol=1e-5 if x.dtype == torch.float32 else 0.1
    )
    assert got.dtype == x.dtype
    return program


# A mean that is large beside the deviations would be lost in a difference of squares.
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norms_over_tokens_are_split(offset: float, golden: Golden) -> None:
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)) + offset
    golden("split_statistics", program_text(rewritten(Norms(), x), bodies=True))


def test_half_precision_is_accumulated_in_single() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6).bfloat16()
    rewritten(Norms().bfloat16(), x)


def test_norms_over_features_stay_whole() -> None:
    program = rewritten(FeatureNorm(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert {aten.group_norm.default, aten.linalg_vector_norm.default} <= {node.target for node in program.graph.nodes}

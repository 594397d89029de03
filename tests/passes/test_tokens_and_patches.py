"""What is divided although patches are made of tokens, or tokens padded, in an unusual way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models

CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KERNEL, GRID = (2, 3, 4), (4, 3, 2)


def operators(traced: xir.TracedProgram) -> list[str]:
    """Names of the operators of the outer graph."""
    return [str(node.target) for node in traced.analysed.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_transposed_convolution_that_makes_patches_is_a_matrix_product(count: int, bias: bool) -> None:
    model = CONVOLUTIONS[count - 1](6, 5, KERNEL[:count], stride=KERNEL[:count], bias=bias).double()
    x = torch.randn(2, 6, *GRID[:count], dtype=torch.float64)
    traced = xir.trace(model, {"input": x})
    assert "aten.linear.default" in operators(traced)
    assert not any("conv_transpose" in name for name in operators(traced))
    [result] = traced.parallelize().simulate(model, {"input": x})
    torch.testing.assert_close(result, model(x))


@pytest.mark.parametrize(
    "changes",
    [{"stride": 1}, {"padding": 1}, {"output_padding": 1}, {"dilation": 2}, {"groups": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_transposed_convolution_stays_one(changes: dict[str, int]) -> None:
    model = nn.ConvTranspose2d(6, 4, **{"kernel_size": 2, "stride": 2} | changes)
    traced = xir.trace(model, {"input": torch.randn(2, 6, 4, 4)})
    assert any("conv_transpose" in name for name in operators(traced))


@pytest.mark.parametrize("name", ["ace-step-1.5", "hidream-dense"])
def test_patches_of_whole_rows_although_the_stream_is_padded(name: str) -> None:
    """Rows of the output, where tokens become patches by a convolution or are what a slice leaves of the stream."""
    model, example = models.load(f"{name}:tiny")
    report = xir.trace(model, example).parallelize(pipefusion=2).report()
    assert sum(report.flops_per_rank) <= 1.05 * report.flops_total

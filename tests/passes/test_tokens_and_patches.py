"""What is divided although patches are made of tokens, or tokens padded, in an unusual way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.pipefusion.rank_tasks import RankTasks

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


def test_codes_are_latents_where_the_output_has_their_scores() -> None:
    """Integers in, and for each the scores of all classes out, in a dim that the codes do not have."""
    model, example = models.load("transformer-2d-vectorized:tiny")
    parallel = xir.trace(model, example).parallelize(pipefusion=2)
    assert parallel.pipeline is not None
    work = RankTasks(parallel.pipeline, 0)
    [output], [codes] = work.cuts, work.latents.values()
    assert output is not None and list(work.latents) == ["hidden_states"]
    assert (output.dim, codes.dim) == (2, 1) and output.parts == codes.parts
    needs = {patch: {need.name: need.patches for need in each.needs} for (_, patch), each in work.displaced.items()}
    assert [needs[patch]["hidden_states"] for patch in range(2)] == [(0,), (1,)], "a patch takes no more than its own"


class Mix(nn.Module):
    """A block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.into(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return x + nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Classified(nn.Module):
    """Scores of classes: of each code or, pooled, of all of them together."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.table, self.out, self.pooled = nn.Embedding(7, 16), nn.Linear(16, 5), pooled
        self.blocks = nn.ModuleList(Mix() for _ in range(4))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.table(codes)
        for block in self.blocks:
            x = block(x)
        scores: torch.Tensor = self.out(x.mean(1) if self.pooled else x)
        return scores


def test_codes_without_scores_are_no_latents() -> None:
    example = {"codes": torch.randint(7, (2, 32))}
    result = xir.check(Classified(pooled=False), example, pipefusion=2)
    assert result.ok, str(result)
    with pytest.raises(xir.ParallelizeError, match="output is not divided"):
        xir.trace(Classified(pooled=True), example).parallelize(pipefusion=2, patches=2)

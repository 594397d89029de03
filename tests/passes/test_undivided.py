"""Models of which `shard-tokens` can divide little or nothing run all the same, and the report says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.sharding.fallbacks import UNDIVIDED

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """`[batch, tokens, width]`, a residual around `mixed`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(HEADS, HEADS)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mixed(x)

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()


class TalkingHeads(Block):
    """Scores are mixed over heads before the softmax (arXiv 2003.02436): no attention that the passes know."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        scores = self.heads((q @ k.transpose(-1, -2)).movedim(1, -1)).movedim(-1, 1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Sorted(Block):
    """Attention in an order that depends on all tokens."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        order = self.score(x).argsort(1).expand_as(x)
        q, k, v = self.split(x.gather(1, order))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return torch.zeros_like(x).scatter(1, order, self.out(y))


class Mapped(Block):
    """Runs under `torch.vmap`, which is not captured: a leaf, of which each rank has a sample."""

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(torch.vmap(lambda one: 2 * one + 1)(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 3}])
@pytest.mark.parametrize("kind", [TalkingHeads, Sorted, Mapped])
def test_it_is_divided_and_equal(kind: type[Block], degrees: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, example = nn.Sequential(kind(), kind(), kind()).eval(), (torch.randn(2, 24, WIDTH),)
    traced = xir.trace(model, example)
    report = traced.parallelize(**degrees).report()
    assert max(report.flops_per_rank) <= 0.6 * report.flops_total
    assert UNDIVIDED not in {entry.reason for entry in report.fallbacks}
    assert xir.check(model, example, traced=traced, **degrees).ok

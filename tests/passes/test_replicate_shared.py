"""Keys of what all blocks share are gathered once, or made on every rank; those of what blocks change are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.api import ParallelProgram
from xdit_ir.ir import ops

WIDTH, HEADS, TOKENS = 32, 4, 256


class Cross(nn.Module):
    """Attention of `x` to itself, then to one section of a text after another."""

    def __init__(self, sections: tuple[int, ...], *, writes: bool) -> None:
        super().__init__()
        self.sections, self.writes = sections, writes
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.query = nn.Linear(WIDTH, WIDTH)
        self.others = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in sections)
        self.text = nn.Linear(WIDTH, WIDTH)

    def attend(self, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attend(*(one(x) for one in self.own))
        for (key, value), part in zip(self.others, text.split(self.sections, 1), strict=True):
            x = x + self.attend(self.query(x), key(part), value(part))
        return x, text + self.text(text) if self.writes else text


class Model(nn.Module):
    """Texts embedded by `depth` wide layers each and joined, and three blocks."""

    def __init__(self, sections: tuple[int, ...], wide: int, *, writes: bool = False) -> None:
        super().__init__()
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH)) for _ in sections
        )
        self.blocks = nn.ModuleList(Cross(sections, writes=writes) for _ in range(3))

    def forward(self, x: torch.Tensor, *texts: torch.Tensor) -> torch.Tensor:
        text = torch.cat([embed(one) for embed, one in zip(self.embed, texts, strict=True)], 1)
        for block in self.blocks:
            x, text = block(x, text)
        return x


def divided(model: Model, sections: tuple[int, ...]) -> ParallelProgram:
    """On four ranks, after a check that each gives what the model gives."""
    torch.manual_seed(0)
    example: tuple[Any, ...] = tuple(torch.randn(2, size, WIDTH) for size in (TOKENS, *sections))
    result = xir.check(model, example, ulysses=4)
    assert result.ok, str(result)
    return xir.trace(model, example).parallelize(ulysses=4)


def count(parallel: ParallelProgram, target: Any) -> tuple[int, int]:
    """How often an operator stands before or behind the blocks, and in them."""
    inside = [node for block in parallel.ir.blocks.values() for node in block.graph.nodes]
    outside = parallel.ir.graph.nodes
    return sum(node.target is target for node in outside), sum(node.target is target for node in inside)


@pytest.mark.parametrize("wide", [64, 4096])
def test_a_short_text_is_gathered_once_or_never(wide: int) -> None:
    """A heavy embedding is divided, and its result gathered; a light one every rank does by itself."""
    parallel = divided(Model((32,), wide), (32,))
    assert count(parallel, ops.gather) == ((2, 0) if wide == 4096 else (1, 0))  # the last is the output's
    report = parallel.report()
    assert max(report.flops_per_rank) <= 0.28 * report.flops_total


def test_only_the_short_one_of_two_joined_texts_is_made_whole() -> None:
    parallel = divided(Model((8, 512), 64), (8, 512))
    assert count(parallel, ops.gather) == (1, 0)
    assert count(parallel, ops.halo_exchange) == (1, 0)
    report = parallel.report()
    assert max(report.flops_per_rank) <= 0.28 * report.flops_total


@pytest.mark.parametrize(("size", "inside"), [(32, 0), (48, 2)])
def test_a_text_that_blocks_change(size: int, inside: int) -> None:
    """It is not gathered before them. Every rank has a short one whole; a longer one stays divided, and each block
    gathers the keys and values that it makes."""
    parallel = divided(Model((size,), 64, writes=True), (size,))
    assert count(parallel, ops.gather) == (1, inside)
    report = parallel.report()
    assert max(report.flops_per_rank) <= 0.28 * report.flops_total

"""Where the rows of latents are in a stream and in an output that have others besides: known by slices, joins, pads and
known places, which patches follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.errors import MismatchError
from xdit_ir.pipefusion.rank_tasks import RankTasks

LATENTS, TEXT, WIDTH = 40, 8, 16
ORDER = torch.arange(LATENTS).view(5, 8).T.reshape(-1)
Places = torch.Tensor
Make = Callable[..., torch.Tensor]


@dataclass
class Rows:
    """What becomes of the latents' tokens before the blocks and behind them, given further inputs; by how much the rows
    of the output are further on than those of the latents."""

    before: Make
    behind: Make
    shift: int = 0
    given: tuple[torch.Tensor, ...] = ()


def _packed(x: torch.Tensor, text: torch.Tensor, where: Places, others: Places) -> torch.Tensor:
    empty = x.new_zeros(x.shape[0], LATENTS + TEXT, WIDTH)
    return empty.index_copy(1, where, x).index_add(1, others, text)


KINDS = {
    "a text in front of the output": Rows(
        lambda x, text: torch.cat([text, x], 1), lambda y, text: y, TEXT, (torch.randn(2, TEXT, WIDTH),)
    ),
    "a reference that the output leaves out": Rows(lambda x: x, lambda y: y[:, TEXT:], -TEXT),
    "an output with its padding": Rows(lambda x: F.pad(x, (0, 0, 0, 24)), lambda y: y),
    "a padded stream": Rows(lambda x: F.pad(x, (0, 0, 0, 24)), lambda y: y[:, :LATENTS]),
    "an order that is undone": Rows(lambda x, order: x[:, order], lambda y, order: y[:, order.argsort()], 0, (ORDER,)),
    "a stream packed by places that are given": Rows(
        _packed,
        lambda y, text, where, others: y.index_select(1, where),
        0,
        (torch.randn(2, TEXT, WIDTH), torch.cat([torch.arange(10), torch.arange(18, 48)]), torch.arange(10, 18)),
    ),
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows, self.blocks = rows, nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        x = self.rows.before(x, *given) + t
        for block in self.blocks:
            x = block(x)
        return self.rows.behind(x, *given)


def _example(rows: Rows) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, LATENTS, WIDTH), torch.rand(1), *rows.given


@pytest.mark.parametrize("rows", KINDS.values(), ids=KINDS)
def test_rows_are_followed_to_the_output(rows: Rows) -> None:
    model, example = Model(rows), _example(rows)
    result = xir.check(model, example, pipefusion=2, patches=3)
    assert result.ok, str(result)
    parallel = xir.trace(model, example).parallelize(pipefusion=2, patches=3)
    report = parallel.report()
    assert sum(report.flops_per_rank) <= 1.01 * report.flops_total
    pipeline: Any = parallel.pipeline
    cut = RankTasks(pipeline, 0).latents["x"]
    assert cut.shift == rows.shift and cut.size == LATENTS


def test_places_are_guarded_under_pipefusion_only() -> None:
    """They hold for a request; without patches an index is an input like any other."""
    rows = KINDS["a stream packed by places that are given"]
    model, example = Model(rows), _example(rows)
    traced = xir.trace(model, example)
    other = (*example[:-2], example[-2].flip(0), example[-1])
    assert traced.parallelize(ulysses=2).simulate(model, other)[0].shape == (2, LATENTS, WIDTH)
    with pytest.raises(MismatchError, match=r"given\[1\]: its contents .* \(where its rows are\)"):
        traced.parallelize(pipefusion=2).simulate(model, other)

"""What must hold of plans whatever the figures are: sums, and what is better with more."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.planning.hardware import Hardware, load


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def built(width: int, heads: int, tokens: int, batch: int) -> tuple[nn.Module, tuple[torch.Tensor]]:
    with torch.device("meta"):
        layers = nn.Sequential(Layer(width, heads), Layer(width, heads)).to(torch.bfloat16)
        return layers, (torch.zeros(batch, tokens, width, dtype=torch.bfloat16),)


MODELS = {"wide": built(3072, 24, 4096, 1), "long": built(1536, 12, 32768, 1), "pair": built(2048, 16, 2048, 2)}


def best_ms(name: str, **options: object) -> float:
    found = xir.plan(*MODELS[name], **options).chosen.ms  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_and_the_text_is_what_the_file_says(name: str) -> None:
    made = xir.plan(*MODELS[name], gpus=4, exact=False)
    worked = [one for one in made.candidates if one.parts is not None]
    assert len(worked) >= 3
    for one in worked:
        assert one.parts is not None and sum(dataclasses.astuple(one.parts)) == pytest.approx(one.ms)
    first, *_ = json.loads(made.to_json())["candidates"]
    row = next(line for line in str(made).splitlines() if " best " in line)
    assert f" {made.chosen.name} " in row and f" {first['ms']:.1f} " in row and f" {max(first['gib']):.1f} " in row


@pytest.mark.parametrize("name", MODELS)
def test_more_gpus_are_never_slower(name: str) -> None:
    times = [best_ms(name, gpus=gpus) for gpus in (1, 2, 4)]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", ["wide", "long"])
def test_a_faster_link_is_never_slower(name: str) -> None:
    def with_links(times: float) -> Hardware:
        one = load("h100")
        return replace(one, links=tuple(replace(link, bytes=link.bytes * times) for link in one.links))

    slow, usual, fast = (best_ms(name, gpus=2, machine=with_links(times)) for times in (0.1, 1, 10))
    assert slow >= usual >= fast and slow > fast


def test_more_memory_is_never_worse() -> None:
    plans = [xir.plan(*MODELS["wide"], gpus=2, memory=gib) for gib in (0.45, 80)]
    times = [made.chosen.ms or 0.0 for made in plans]
    assert times == sorted(times, reverse=True)
    assert all(max(made.chosen.gib) <= made.memory for made in plans)
    assert max(plans[0].chosen.weights) < max(plans[-1].chosen.weights)


def test_stages_only_where_results_need_not_be_exact() -> None:
    made = xir.plan(*MODELS["pair"], gpus=2)
    assert all(one.exact for one in made.candidates) and made.best["pipefusion"] == 1

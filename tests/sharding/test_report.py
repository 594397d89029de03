"""The report is honest: gathers count wherever they stand, shares are told by region, idle ranks are named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.checking.limits import Limits
from xdit_ir.sharding.report import NO_FALLBACKS, Report

WIDTH, HEADS = 32, 4


class Layer(nn.Module):
    """Attention and a projection; `summed` adds products over all tokens before."""

    def __init__(self, *, summed: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.summed = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), summed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + (self.out(y.cumprod(1)) if self.summed else y)


class Model(nn.Module):
    """Some layers, and a projection that may need all tokens first."""

    def __init__(self, *summed: bool, last: str = "") -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), last
        self.layers = nn.Sequential(*(Layer(summed=one) for one in summed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.first(x))
        return self.last(x.sort(1).values) if self.how == "sort" else self.last(x)


def report_of(model: nn.Module, tokens: int = 24, **degrees: int) -> Report:
    example = (torch.randn(2, tokens, WIDTH),)
    return xir.trace(model.eval(), example).parallelize(**degrees).report()


class Largest(nn.Module):
    """Adaptive pooling that also gives places, for which every rank needs all rows; of single elements here."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        sizes = [2 * size for size in hidden_states.shape[2:]]
        return self.conv(nn.functional.adaptive_max_pool2d(hidden_states, sizes))


def decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    sampler = vae.decoder.up_blocks[0].upsamplers[0]
    vae.decoder.up_blocks[0].upsamplers[0] = Largest(sampler.conv)
    return vae.decoder.eval(), {"sample": torch.randn(1, 4, 16, 16)}


def test_a_gather_in_a_block_that_is_called_once() -> None:
    """An operator deep in the block needs all rows; what is behind it is divided again."""
    report = xir.trace(*decoder()).parallelize(ulysses=2).report()
    [found] = report.fallbacks
    assert found.op.startswith("adaptive_max_pool2d") and "test_report.py" in found.place
    assert found.reason == report.reason(found) == "needs the dimension whole"
    assert found.bytes > 0 and found.repeated == 0
    assert report.share <= 0.5 * 1.02  # rows at the edges of parts are computed twice, in a small block more of it
    assert all(max(one.flops_per_rank) <= 0.54 * one.flops_total for one in report.uneven)
    share, fallbacks = Limits(0.45, 0).exceeded(report)
    assert share.startswith(f"the slowest rank does {report.share:.4f} of the FLOPs, above 0.45")
    assert fallbacks.startswith("fallbacks: 1, above 0\n  adaptive_max_pool2d")


def test_a_gather_in_every_call_of_a_block() -> None:
    report = report_of(Model(True, True), ulysses=2)
    [found] = report.fallbacks
    assert found.op.startswith("cumprod") and found.place.startswith("Layer ")
    assert found.reason == "needs the dimension whole"
    assert found.bytes == 2 * 2 * 12 * WIDTH * 4  # calls, samples, tokens of a rank, features, bytes of each


def test_a_gather_outside_of_blocks() -> None:
    report = report_of(Model(False, False, last="sort"), ulysses=2)
    [found] = report.fallbacks
    assert found.op.startswith("sort") and found.reason == "needs the dimension whole; outside of blocks"


@pytest.mark.parametrize("last", ["", "sort"])
def test_without_blocks(last: str) -> None:
    """One layer is no block; regions are modules, and the output's gather is no fallback."""
    report = report_of(Model(False, last=last), ulysses=2)
    assert [item.op.partition(".")[0] for item in report.fallbacks] == [last] * bool(last)
    assert [region.name for region in report.regions] == ["first", "layers.0.qkv", "layers.0", "layers.0.out", "last"]
    assert (NO_FALLBACKS in str(report)) == (not last)


def test_a_diffusion_transformer_has_none() -> None:
    model, example = models.load("plain-dit:tiny")
    report = xir.trace(model, example).parallelize(ulysses=2).report()
    assert report.fallbacks == [] and report.idle == []
    assert sum(region.flops_total for region in report.regions) == report.flops_total
    for rank, flops in enumerate(report.flops_per_rank):
        assert sum(region.flops_per_rank[rank] for region in report.regions) == flops
    assert Limits(0.55, 0).exceeded(report) == ()


def test_ranks_that_idle_are_named() -> None:
    """Two tokens for three ranks."""
    report = report_of(Model(False, False), tokens=2, ring=3)
    assert [one.rank for one in report.idle] == [rank for rank in range(3) if not report.flops_per_rank[rank]]
    assert str(report.idle[0]) in str(report)


def test_halves_that_run_different_calls_do_a_forward_each() -> None:
    traced = xir.trace(Model(False, False).eval(), (torch.randn(2, 24, WIDTH),))
    report = traced.parallelize(cfg=2, pair_calls=True).report()
    assert report.share == report.fair_share == 1 and report.uneven == report.idle == []


def test_stages_of_a_pipeline_have_regions_too() -> None:
    report = report_of(Model(False, False, False, False), pipefusion=2)
    assert {"prologue", "Layer", "epilogue"} == {region.name for region in report.regions}
    assert report.idle == []

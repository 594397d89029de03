"""Decoders and encoders of autoencoders are divided by rows: each rank does its part of the work, and all have the
result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.ir.printer import program_text
from xdit_ir.sharding.machine import Machine


def kl() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
    )


def wan() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
    )


def tiny() -> AutoencoderTiny:
    channels, blocks = (16, 16), (1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    )  # fmt: skip


def dc() -> AutoencoderDC:
    """Pixels are shuffled instead of repeated."""
    channels, layers, kinds = (32, 64), (1, 1), ("ResBlock", "ResBlock")
    return AutoencoderDC(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, latent_channels=8,
        encoder_layers_per_block=layers, decoder_layers_per_block=layers,
        encoder_block_types=kinds, decoder_block_types=kinds,
    )  # fmt: skip


CASES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "kl decoder": (kl, "decoder", (1, 4, 24, 20)),
    "kl encoder": (kl, "encoder", (1, 3, 64, 48)),
    "wan decoder": (wan, "decoder", (1, 4, 1, 24, 12)),
    "tiny decoder": (tiny, "decoder", (1, 4, 24, 20)),
    "dc decoder": (dc, "decoder", (1, 8, 24, 16)),
    "dc encoder": (dc, "encoder", (1, 3, 48, 32)),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_it_is_divided_by_rows(name: str, ranks: int) -> None:
    make, part, shape = CASES[name]
    torch.manual_seed(0)
    module: nn.Module = getattr(make(), part).eval()
    example = (torch.randn(shape),)
    parallel = xir.trace(module, example).parallelize(ulysses=ranks)
    report = parallel.report()
    assert report.share <= 1.12 / ranks, str(report)
    assert not report.fallbacks
    with torch.no_grad():
        want = tensors_of(module(*example))
        for outputs in parallel.simulate(module, example):
            assert relative_error(tensors_of(outputs), want) <= 1e-5


@pytest.mark.parametrize("name", ["kl decoder", "tiny decoder", "dc encoder"])
def test_one_of_two_ranks_needs_six_tenths_of_the_memory(name: str) -> None:
    """Values that are there at a time; of an image of more rows, so that halos are few."""
    make, part, (*sizes, rows, columns) = CASES[name]
    traced = xir.trace(getattr(make(), part).eval(), (torch.randn(*sizes, 4 * rows, columns),))
    alone, divided = (traced.parallelize(ulysses=ranks).report().memory for ranks in (1, 2))
    assert max(one.activations for one in divided) <= 0.6 * alone[0].activations, divided


def test_where_exchanges_take_no_time_nothing_is_made_early_to_fill_it() -> None:
    """Such as the shortcut around a block, which lies there until the block is done."""
    make, part, (*sizes, rows, columns) = CASES["kl decoder"]
    traced = xir.trace(getattr(make(), part).eval(), (torch.randn(*sizes, 4 * rows, columns),))
    fast = Machine(bytes=1e15, latency=0.0)
    [alone], filled, divided = (
        traced.parallelize(ulysses=ranks, machine=machine).report().memory
        for ranks, machine in ((1, fast), (2, Machine()), (2, fast))
    )
    most = max(one.activations for one in divided)
    assert most < 0.9 * max(one.activations for one in filled) and most <= 0.53 * alone.activations


def test_pads_of_nothing_are_dropped() -> None:
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.pad(x + 1, (0, 0, 0, 0), mode="replicate") * 2

    traced = xir.trace(Padded(), (torch.randn(1, 2, 4, 4),))
    assert "pad" in traced.text() and "pad" not in program_text(traced.analysed)


def test_frames_that_are_decoded_one_by_one_are_a_block_for_each_kind_of_step() -> None:
    """The first frame, the second, which finds caches of one frame, and all others, which find caches of two."""
    traced = xir.trace(wan().eval().decode, {"z": torch.randn(1, 4, 5, 6, 4)})
    assert len(traced.ir.blocks) == 3
    assert len(list(traced.ir.calls)) == 5

"""What emitted code costs where there is nothing to divide: `python benchmarks/one_rank.py`.

Each model is emitted for one rank and timed against the module that it was traced from, eagerly on CPU, in pairs whose
order alternates, all in one run. What is timed is what one thread computes, which other processes disturb little.
Prints per model both medians in milliseconds, and the ratio of the pairs: median and quartiles. Outputs are compared
first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models

Case = tuple[nn.Module, dict[str, Any]]
FLUX = dict(
    patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=8,
    joint_attention_dim=512, pooled_projection_dim=256, guidance_embeds=True, axes_dims_rope=(8, 28, 28),
)  # fmt: skip
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=8, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=512,
    freq_dim=256, ffn_dim=1536, num_layers=4, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
)  # fmt: skip
DECODER = dict(
    block_out_channels=(64, 128, 256, 256), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip


def flux() -> Case:
    """512 image tokens of width 512, 64 of text."""
    from diffusers import FluxTransformer2DModel

    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(32.0), indexing="ij")
    image = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3)
    inputs = {
        "hidden_states": torch.randn(1, 512, 64),
        "encoder_hidden_states": torch.randn(1, 64, 512),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "img_ids": image,
        "txt_ids": torch.zeros(64, 3),
        "return_dict": False,
    }
    return FluxTransformer2DModel(**FLUX), inputs


def wan() -> Case:
    """4 frames of 16 x 16 latents, 256 tokens of width 512, 64 of text."""
    from diffusers import WanTransformer3DModel

    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 512),
        "return_dict": False,
    }
    return WanTransformer3DModel(**WAN), inputs


def decoder() -> Case:
    """Latents of 32 x 32 to an image of 256 x 256."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**DECODER).decoder, {"sample": torch.randn(1, 4, 32, 32)}


CASES: dict[str, Callable[[], Case]] = {"flux": flux, "wan": wan, "decoder": decoder}


def seconds(run: Callable[[], Any]) -> float:
    """Of this process, for one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def measure(name: str, pairs: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model = models.randomize(model.eval(), 0)
    emitted = xir.trace(model, inputs).parallelize().emit(model)
    runs = [lambda: model(**inputs), lambda: emitted(**inputs)]
    wanted, got = (one() for one in runs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    found: list[list[float]] = [[], []]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            found[which].append(seconds(runs[which]))
    own, ours = (statistics.median(times) * 1e3 for times in found)
    low, middle, high = statistics.quantiles((b / a for a, b in zip(*found, strict=True)), n=4)
    return f"{name:<10} {own:9.1f} {ours:9.1f} {middle:8.3f}  {low:.3f} .. {high:.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':<10} {'module':>9} {'emitted':>9} {'ratio':>8}  quartiles", flush=True)
    for name in given.models:
        print(measure(name, given.pairs), flush=True)


if __name__ == "__main__":
    main()

"""Decoders of published size without GPUs: `python benchmarks/decoders.py [NAME ...]`.

Each is traced and divided over two ranks on the meta device. Printed are the seconds of processor time of both, the
part of the work and of the memory of activations (exchanges under way included) of one GPU alone that the rank with the
most has, and the number of exchanges.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from typing import Any

import diffusers
import torch

import xdit_ir as xir

FLUX = {
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# The class, the shape of latents, what is not its default, and whether tiles are on.
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], bool]] = {
    "wan-480p": ("AutoencoderKLWan", (1, 16, 21, 60, 104), {}, False),
    "flux-2048px": ("AutoencoderKL", (1, 16, 256, 256), FLUX, False),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", (1, 16, 5, 60, 104), {}, False),
    "cogvideox": ("AutoencoderKLCogVideoX", (1, 16, 3, 60, 90), {}, False),
    "hunyuanvideo-tiled": ("AutoencoderKLHunyuanVideo", (1, 16, 16, 90, 160), {}, True),
}


def measured(name: str) -> str:
    """What is printed for one decoder."""
    cls, latents, config, tiled = CASES[name]
    with torch.device("meta"):
        vae = getattr(diffusers, cls)(**config).to(torch.bfloat16).eval()
        z = torch.randn(latents, dtype=torch.bfloat16)
    if tiled:
        vae.enable_tiling()
    times = [time.process_time()]
    with torch.inference_mode():
        traced = xir.trace(vae.decode, {"z": z})
        times.append(time.process_time())
        divided = traced.parallelize(ulysses=2)
        times.append(time.process_time())
        alone, report = traced.parallelize().report(), divided.report()
    whole, part = (max(one.activations + one.exchanges for one in each.memory) for each in (alone, report))
    trace, division = (after - before for before, after in itertools.pairwise(times))
    exchanges = sum(one.count for one in report.collectives)
    return (
        f"{name}: trace {trace:.1f} s, division {division:.1f} s, {report.share:.3f} of the work, "
        f"{part / whole:.3f} of {whole / 2**30:.1f} GiB, {exchanges} exchanges"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for case in sys.argv[1:] or CASES:
        print(measured(case), flush=True)

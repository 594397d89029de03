"""Decoders of published size in bf16 over real GPUs: `python tests/gpu/decoders.py --ranks 2`.

Each decoder, with equal random weights on every rank, decodes alone on one GPU as diffusers runs it, and then ported as
`port(pipe)` ports it; the outputs are compared, and both are timed. Goes on behind a failure in a new process and ends
by itself; status 1 if anything failed, differed or was slower than one GPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lanes
import published

CALLS = 4


@dataclass(frozen=True)
class Case:
    """A class of diffusers, the shape of its latents, and what is not its default."""

    cls: str
    latents: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    tiled: bool = False


CASES = {
    "wan-480p": Case("AutoencoderKLWan", (1, 16, 21, 60, 104)),
    "wan-720p": Case("AutoencoderKLWan", (1, 16, 21, 90, 160)),
    "flux-2048px": Case(
        "AutoencoderKL",
        (1, 16, 256, 256),
        {
            "latent_channels": 16,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "hunyuanvideo-tiled": Case("AutoencoderKLHunyuanVideo", (1, 16, 16, 90, 160), tiled=True),
}


def tried(name: str, degrees: str, mode: str) -> lanes.Result:
    """What becomes of a decoder under these degrees."""
    import diffusers
    import torch

    import xdit_ir as xir
    from xdit_ir.ir.difference import relative_error
    from xdit_ir.models.weights import randomize

    case, start, device = CASES[name], time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    with device:
        vae: Any = randomize(getattr(diffusers, case.cls)(**case.config)).to(torch.bfloat16).eval()
    if case.tiled:
        vae.enable_tiling()
    make = torch.Generator(device).manual_seed(1)
    latents = torch.randn(case.latents, generator=make, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        want = vae.decode(latents).sample.float()
        before = published.milliseconds(vae.decode, {"z": latents}, CALLS)
        xir.port(SimpleNamespace(components={"vae": vae}), components=["vae"], mode=mode, **lanes.degrees_of(degrees))
        first = time.monotonic()
        vae.decode(latents)
        first = time.monotonic() - first
        got = vae.decode(latents).sample.float()
        after = published.milliseconds(vae.decode, {"z": latents}, CALLS)
    error, report = relative_error([got], [want]), vae.decode.report()
    gain = statistics.median(before) / statistics.median(after)
    return {
        "status": "different" if error > published.LIMIT else "slower" if gain < 1 else "equal",
        "error": float(error),
        "seconds": time.monotonic() - start,
        "times": f"alone {published.range_of(before)}, ported {published.range_of(after)}, {gain:.2f}x",
        "runs": f"{report.share:.3f} of the work; {report.execution}; first call {first:.0f} s",
        "alone_ms": before,
        "ported_ms": after,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        lanes.work(tried, *json.loads(sys.argv[2]))
    given = lanes.arguments(__doc__, degrees="u2", lanes=1).parse_args()
    sys.exit(lanes.share_out(given, given.names or sorted(CASES)))

"""Decoders of published size in bf16 over real GPUs: `python tests/gpu/decoders.py --ranks 2`.

Each decoder, with equal random weights on every rank, decodes alone on one GPU as diffusers runs it, and then ported as
`port(pipe)` ports it; the outputs are compared, and both are timed. `--mode eager,recorded,compiled,graph` does so in
each of these modes (`recorded`: in CUDA graphs, nothing compiled) and says what each takes for a call, for the first
one, and of the GPU's memory. Each is a result of its own, printed as soon as it is there, so that none is lost to a
later one that is slow. Goes on behind a failure in a new process and ends by itself; status 1 if anything failed,
differed or was slower than one GPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import lanes
import published

CALLS = 4


CASES = ("flux-2048px", "flux-2048px-tiled", "hunyuanvideo-tiled", "wan-480p", "wan-480p-tiled", "wan-720p")


def tried(task: str, degrees: str, _: str) -> lanes.Result:
    """What becomes of a decoder in one mode (`DECODER:MODE`) under these degrees."""
    import torch

    name, _, mode = task.partition(":")
    start = time.monotonic()
    with torch.inference_mode():
        alone = _alone(name)
        way = ported(alone.vae, alone.latents, alone.sample, mode, degrees)
    gain = statistics.median(alone.ms) / statistics.median(way["ms"])
    return {
        "status": "different" if way["error"] > published.LIMIT else "slower" if gain < 1 else "equal",
        "error": way["error"],
        "seconds": time.monotonic() - start,
        "times": f"alone {published.range_of(alone.ms)}",
        "runs": f"{way['text']}, {gain:.2f}x",
        "alone_ms": alone.ms,
        "ported_ms": way["ms"],
    }


@dataclass(frozen=True, eq=False)
class Alone:
    """A decoder as diffusers runs it on one GPU: what it makes of its latents, and in how many milliseconds."""

    vae: Any
    latents: Any
    sample: Any
    ms: list[float]


@lru_cache(maxsize=1)  # for all modes of a decoder, which follow each other
def _alone(name: str) -> Alone:
    import torch

    from xdit_ir.models.decoders import DECODERS
    from xdit_ir.models.weights import randomize

    case, device = DECODERS[name], torch.device("cuda", torch.cuda.current_device())
    with device:
        vae: Any = randomize(case.made()).to(torch.bfloat16)
    make = torch.Generator(device).manual_seed(1)
    latents = torch.randn(case.latents, generator=make, device=device, dtype=torch.bfloat16)
    sample = vae.decode(latents).sample.float()
    return Alone(vae, latents, sample, published.milliseconds(vae.decode, {"z": latents}, CALLS))


def ported(vae: Any, latents: Any, want: Any, mode: str, degrees: str) -> dict[str, Any]:
    """How far a port in one mode is from the original, and what it takes; the original is there again afterwards."""
    import torch

    import xdit_ir as xir
    from xdit_ir.ir.difference import relative_error

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    way: dict[str, Any] = {"compile": False, "cuda_graph": True} if mode == "recorded" else {"mode": mode}
    xir.port(SimpleNamespace(components={"vae": vae}), components=["vae"], **way, **lanes.degrees_of(degrees))
    first = time.monotonic()
    vae.decode(latents)
    torch.cuda.synchronize()
    first = time.monotonic() - first
    error = float(relative_error([vae.decode(latents).sample.float()], [want]))
    times = published.milliseconds(vae.decode, {"z": latents}, CALLS)
    report, most = vae.decode.report(), torch.cuda.max_memory_reserved() / 2**30
    text = (
        f"{published.range_of(times)}, {report.share:.3f} of the work, {sum(one.count for one in report.collectives)} "
        f"exchanges, first call {first:.0f} s, {most:.1f} GiB; {report.execution}"
    )
    for method in ("encode", "decode"):
        vars(vae).pop(method, None)
    gc.collect()
    return {"error": error, "ms": times, "text": text}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        lanes.work(tried, *json.loads(sys.argv[2]))
    given = lanes.arguments(__doc__, degrees="u2", lanes=1).parse_args()
    parts = (name.partition("@") for name in given.names or CASES)
    modes = [f"{name}:{mode}{at}{degrees}" for name, at, degrees in parts for mode in given.mode.split(",")]
    sys.exit(lanes.share_out(given, modes))

"""Step caches at full size: `torchrun --standalone --nproc-per-node 2 tests/gpu/caching.py [flux.1-dev [RULE ...]]`.

Denoises 28 steps with the published configuration and the same random bf16 weights on every rank, in mode "auto": alone
and with Ulysses over all ranks, each without and with the cache (default: every:2, and first-block:0.3, whose use
depends on the weights; "taylor" and "broadcast" are diffusers' own, by `enable_cache`). Prints seconds, calls left out,
the relative difference of latents to those of one GPU with the same cache, and the speed-up as a part of the product of
the two alone. Ends with status 1 if latents or counts differ.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import diffusers
import parity
import staged
import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.difference import tensors_of

STEPS = 28
ROUNDING = 2e-2  # bf16


CLOCK = {"timestep": 1000.0}  # which diffusers' caches ask
HOOKED = {
    "taylor": diffusers.hooks.TaylorSeerCacheConfig(cache_interval=4, taylor_factors_dtype=torch.bfloat16),
    "broadcast": diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: CLOCK["timestep"]
    ),
}


def denoised(module: Any, example: dict[str, Any]) -> torch.Tensor:
    """Latents after all steps."""
    x = example["hidden_states"]
    module._reset_stateful_cache()
    with torch.inference_mode(), module.cache_context("cond"):
        for step in range(STEPS):
            CLOCK["timestep"] = 1000 * (1 - step / STEPS)
            now = example | {"hidden_states": x, "timestep": example["timestep"] * 0 + (1 - step / STEPS)}
            x = x - tensors_of(module(**now))[0] / STEPS
    return torch.as_tensor(x).float().clone()


def measured(
    model: nn.Module, example: dict[str, Any], ranks: int, cache: str | None
) -> tuple[torch.Tensor, float, int]:
    """Latents, seconds of the fastest of three requests after two, and calls left out in a request."""
    port: Any = xir.port(model, ulysses=ranks, cache=None if cache in HOOKED else cache)
    if cache in HOOKED:
        port.enable_cache(HOOKED[cache])
    seconds = []
    for _ in range(5):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        latents = denoised(port, example)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    used, best = port.report().cache, min(seconds[2:])
    skipped = 0 if used is None else used.skipped // 5
    if dist.get_rank() == 0:
        print(f"{ranks} ranks, cache {cache}: {best:.3f} s, {skipped} of {STEPS} left out; {port.report().execution}")
    if cache in HOOKED:
        port.disable_cache()
    port.reset()
    return latents, best, skipped


def main() -> int:
    """Compare and print."""
    device, ranks, failed = staged.start(), dist.get_world_size(), False
    name, *rules = sys.argv[1:] or ["flux.1-dev"]
    model, example = parity.load(name, device)
    _, alone, _ = measured(model, example, 1, None)
    _, shared, _ = measured(model, example, ranks, None)
    for rule in rules or ["every:2", "first-block:0.3"]:
        want, cached, expected = measured(model, example, 1, rule)
        got, both, skipped = measured(model, example, ranks, rule)
        error = ((got - want).norm() / want.norm()).item()
        part = (alone / both) / ((alone / cached) * (alone / shared))
        failed |= error > ROUNDING or skipped != expected
        print(f"rank {dist.get_rank()} {rule}: difference {error:.2e}, {part:.3f} of the product", flush=True)
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

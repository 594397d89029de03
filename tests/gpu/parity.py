"""Full-size parity over NCCL: `torchrun --standalone --nproc-per-node 2 tests/gpu/parity.py flux.1-dev`.

Every rank fills the published configuration with the same random bf16 weights, runs it alone, and then ported with
Ulysses and with Ring over all ranks; prints the relative difference and eager times. Not a benchmark against peers.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import staged
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models


def load(name: str, device: torch.device, blocks: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The full-size model and its example with random contents, equal on every rank; of each kind only so many
    `blocks`."""
    model, example = models.load(name, seed=0, device=str(device), dtype=torch.bfloat16)
    for layers in [module for module in model.children() if blocks and isinstance(module, nn.ModuleList)]:
        del layers[blocks:]
    torch.cuda.empty_cache()
    return model, example


def rounded_otherwise(example: Mapping[str, Any]) -> dict[str, Any]:
    """The example with its latents, the first input of three dims and more, changed by what bf16 rounds away."""
    floats = (x for x in pytree.tree_leaves(example) if isinstance(x, torch.Tensor) and x.is_floating_point())
    latents = next(x for x in floats if x.dim() > 2)
    noise = torch.randn(latents.shape, device=latents.device, generator=torch.Generator(latents.device).manual_seed(1))
    changed = (latents * (1 + 2**-9 * noise)).to(latents.dtype)
    return {name: pytree.tree_map(lambda x: changed if x is latents else x, given) for name, given in example.items()}


def timed(run: Callable[[], Any], repeats: int = 8) -> tuple[torch.Tensor, str]:
    """The first output tensor in fp32, and median, min and max milliseconds after three warm-up calls."""
    times = []
    with torch.inference_mode():
        for repeat in range(3 + repeats):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            output = run()
            torch.cuda.synchronize()
            if repeat >= 3:
                times.append((time.perf_counter() - start) * 1e3)
    text = f"median {statistics.median(times):.1f} ms, min {min(times):.1f}, max {max(times):.1f}"
    return pytree.tree_leaves(output)[0].float(), text


def settled(port: Any, example: dict[str, Any], title: str) -> tuple[torch.Tensor, float, float]:
    """The first output in fp32 of a port that has made its programs; then the peak of memory that calls take, and what
    is kept between them, in GiB. Prints a line with the times."""
    with torch.inference_mode():
        for _ in range(2):
            port(**example)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    output, text = timed(lambda: port(**example))
    peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30
    print(f"rank {dist.get_rank()} {title}: {text}; peak {peak:.2f} GiB, reserved {reserved:.2f} GiB", flush=True)
    return output, peak, reserved


def main() -> None:
    """Compare and print, rank by rank."""
    rank = int(os.environ["LOCAL_RANK"])
    device = staged.start()
    model, example = load(sys.argv[1], device)
    alone, text = timed(lambda: model(**example))
    print(f"rank {rank} {sys.argv[1]} alone: {text}", flush=True)
    for name in ("ulysses", "ring"):
        ported = xir.port(model, **{name: dist.get_world_size()})
        output, text = timed(lambda ported=ported: ported(**example))
        error = ((output - alone).norm() / alone.norm()).item()
        print(f"rank {rank} {name}: {text}; relative difference to one GPU in bf16 {error:.2e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

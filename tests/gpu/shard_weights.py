"""Weights over ranks at full size: `torchrun --standalone --nproc-per-node 2 tests/gpu/shard_weights.py [flux.1-dev]`.

Ports the published configuration, with the same random bf16 weights on every rank, with Ulysses over all ranks: first
as it is, then with `shard_weights=True`, to which the model gives its weights up. For each: seconds to the third
output, milliseconds of later calls, and the memory of the GPU that is taken when they are over, all of it, as parts
that peers read lie beside what PyTorch's allocator has. Printed are ratios and the relative difference of the outputs.
Ends with status 1 if a result differs.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import parity
import staged
import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir

ROUNDING = 2e-2  # bf16: kernels may sum in another order where weights lie elsewhere
CALLS = 16


def taken() -> float:
    """GiB of the GPU that are in use, by whatever."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def measured(name: str, port: nn.Module, example: dict[str, Any], before: float) -> tuple[torch.Tensor, float, float]:
    """The output in fp32, the median of milliseconds, and GiB that are taken more than `before`; prints lines."""
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(2):
            port(**example)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    output, text = parity.timed(lambda: port(**example), CALLS)
    memory = taken() - before
    print(f"rank {dist.get_rank()} {name}: {text}; {memory:.2f} GiB; first calls {seconds:.1f} s", flush=True)
    if dist.get_rank() == 0:
        print(*str(port.report()).splitlines()[:2], port.report().execution, sep="\n", flush=True)
    port.reset()
    return output, float(text.split()[1]), memory


def main() -> int:
    """Compare and print, rank by rank."""
    device = staged.start()
    before = taken()
    model, example = parity.load(sys.argv[1] if len(sys.argv) > 1 else "flux.1-dev", device)
    degrees = {"ulysses": dist.get_world_size()}
    want, plain, whole = measured("whole", xir.port(model, **degrees), example, before)
    got, gathered, parts = measured("parts", xir.port(model, **degrees, shard_weights=True), example, before)
    error = ((got - want).norm() / want.norm()).item()
    bits = "equal" if torch.equal(got, want) else "other"
    print(
        f"rank {dist.get_rank()}: {gathered / plain:.3f} of the time, {parts / whole:.3f} of the memory; relative "
        f"difference {error:.2e}, {bits} bits",
        flush=True,
    )
    dist.destroy_process_group()
    return int(error > ROUNDING)


if __name__ == "__main__":
    sys.exit(main())

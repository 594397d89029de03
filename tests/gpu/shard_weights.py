"""Weights over ranks at full size: `torchrun --standalone --nproc-per-node 2 tests/gpu/shard_weights.py [flux.1-dev]`.

Ports the published configuration, with the same random bf16 weights on every rank, with Ulysses over all ranks: first
as it is, then with `shard_weights=True`, to which the model gives its weights up, with parts gathered by NCCL and, of
a second such model, fetched by copy engines (`transport="peer"`). For each: milliseconds, peak of the memory that
PyTorch's allocator gave in the timed calls (parts that peers read lie beside it), and the relative difference of the
outputs. Ends with status 1 if a result differs.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import parity
import staged
import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir

ROUNDING = 2e-2  # bf16: kernels may sum in another order where weights lie elsewhere


def measured(name: str, model: nn.Module, example: dict[str, Any], **options: Any) -> tuple[torch.Tensor, float]:
    """The output and the peak in GiB of a port in mode "auto"; prints a line."""
    port = xir.port(model, ulysses=dist.get_world_size(), **options)
    output, peak, _ = parity.settled(port, example, name)
    if dist.get_rank() == 0:
        print(str(port.report()).splitlines()[0], str(port.report()).splitlines()[1], port.report().execution, sep="\n")
    port.reset()
    return output, peak


def main() -> int:
    """Compare and print, rank by rank."""
    device = staged.start()
    model, example = parity.load(sys.argv[1] if len(sys.argv) > 1 else "flux.1-dev", device)
    want, whole = measured("whole", model, example)
    gc.collect()
    torch.cuda.empty_cache()
    errors = []
    for title, options in (("parts", {}), ("parts by copy engines", {"transport": "peer"})):
        if errors:
            model, example = parity.load(sys.argv[1] if len(sys.argv) > 1 else "flux.1-dev", device)
        got, parts = measured(title, model, example, shard_weights=True, **options)
        errors.append(((got - want).norm() / want.norm()).item())
        bits = "equal" if torch.equal(got, want) else "other"
        print(
            f"rank {os.environ['LOCAL_RANK']} {title}: relative difference {errors[-1]:.2e}, {bits} bits; peak "
            f"{parts / whole:.3f} of that with whole weights",
            flush=True,
        )
    dist.destroy_process_group()
    return int(max(errors) > ROUNDING)


if __name__ == "__main__":
    sys.exit(main())

"""Weights from the host at full size: `torchrun --standalone --nproc-per-node 1 tests/gpu/streaming.py [flux.1-dev]`.

Ports the published configuration with random bf16 weights, with Ulysses over all ranks: with all weights on the GPU,
and with `stream_weights=True`, recorded and one operator after the other. For each: milliseconds, peak of GPU memory in
the timed calls, and the relative difference of the outputs; besides, what the bus gives and what the report says. Needs
as much memory of the host as the model has weights, over all ranks. Ends with status 1 if a result differs, if uploads
are not part of one graph, or if the GPU then keeps more than a third of what it does without; and by itself.

With amounts behind the model (`flux.2-dev 16GiB 19GiB`) so much of the weights stays on each GPU, recorded.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
from typing import Any

import parity
import staged
import torch
import torch.distributed as dist

import xdit_ir as xir
from xdit_ir.ir.program import Stored, TensorSpec
from xdit_ir.transport.uploads import pinned

ROUNDING = 2e-2  # bf16: kernels may sum in another order where weights lie elsewhere
LIMIT = 540  # seconds
GIB = 2**30


def bus(device: torch.device) -> float:
    """GB/s of this rank's uploads while all ranks upload."""
    stored = Stored(TensorSpec((GIB,), torch.uint8), (("nothing", 0),), on_host=True)
    host, here = pinned(stored, device), torch.empty(GIB, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    here.copy_(host, non_blocking=True)
    dist.barrier()
    begin.record()
    for _ in range(8):
        here.copy_(host, non_blocking=True)
    end.record()
    end.synchronize()
    return 8 * GIB / begin.elapsed_time(end) / 1e6


def measured(title: str, name: str, device: torch.device, **options: Any) -> tuple[torch.Tensor, float, str]:
    """The output, the GiB that the GPU keeps, and how it ran, of a port; prints lines."""
    gc.collect()  # what was measured before
    torch.cuda.empty_cache()
    model, example = parity.load(name, device)
    port = xir.port(model, ulysses=dist.get_world_size(), **options)
    output, _, reserved = parity.settled(port, example, title)
    report = port.report()
    if dist.get_rank() == 0:
        print(f"  {report.gathered.upload_text}" if report.gathered.uploaded else "", f"  {report.execution}", sep="\n")
    port.reset()
    return output, reserved, report.execution


def main() -> int:
    """Compare and print, rank by rank."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    device, name, bad = staged.start(), sys.argv[1] if len(sys.argv) > 1 else "flux.1-dev", []
    print(f"rank {dist.get_rank()}: the bus gives {bus(device):.1f} GB/s", flush=True)
    (want, whole, _), amounts = measured("resident", name, device), sys.argv[2:]
    kept = whole if amounts else whole / 3
    for stays, mode in [(one, "auto") for one in amounts] or [(True, "auto"), (True, "eager")]:
        title = f"streamed, {mode}, {stays} stay" if amounts else f"streamed, {mode}"
        got, parts, execution = measured(title, name, device, stream_weights=stays, mode=mode)
        error = ((got - want).norm() / want.norm()).item()
        bits = "equal" if torch.equal(got, want) else "other"
        print(f"rank {dist.get_rank()} {title}: relative difference {error:.2e}, {bits} bits; {parts / whole:.3f} kept")
        bad += [f"{title} differs"] if error > ROUNDING else []
        bad += [f"{title} keeps {parts:.1f} of {whole:.1f} GiB"] if mode == "auto" and parts > kept else []
        bad += [f"{title} runs {execution}"] if mode == "auto" and "1 CUDA graph a forward" not in execution else []
    print(*bad or ["all right"], sep="\n", flush=True)
    dist.destroy_process_group()
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

"""What a forward costs the host without a CUDA graph: `torchrun --standalone --nproc-per-node 2 tests/gpu/host.py`.

FLUX.1-dev of published size (or the model that is named) under `ulysses` over all ranks, by each mode and each way in
which exchanges can travel. Prints for each how long a call takes to return, which is the host's part, and how long with
the GPU's; medians of all ranks' slowest. `--profile` prints instead where the host of the last rank
spends its time, by functions of Python; `--trace FOLDER` writes what each rank's host and GPU do, for Chrome.
`--compiler combo_kernels` switches options of PyTorch's compiler on, to see what they would save. With `--loopback 2`,
started by itself on one GPU, it is the first of two ranks that waits for nobody (`loopback.py`).
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loopback
import torch
import torch.distributed as dist
from parity import load
from torch._inductor import config as inductor

import xdit_ir as xir

WAYS = ("compiled/collective", "compiled/packed", "compiled/peer", "eager/collective", "eager/packed", "eager/peer")


def slowest(seconds: float, device: torch.device) -> float:
    """Milliseconds of the slowest rank."""
    found = torch.tensor([seconds * 1e3], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def measure(call: Callable[[], object], device: torch.device, calls: int = 12) -> tuple[float, float]:
    """Medians: until a call returns, and until the GPU has done it."""
    returned, done = [], []
    for _ in range(calls):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        between = time.perf_counter()
        torch.cuda.synchronize()
        done.append(slowest(time.perf_counter() - start, device))
        returned.append(slowest(between - start, device))
    return statistics.median(returned), statistics.median(done)


def profile(call: Callable[[], object], calls: int = 10) -> None:
    """Print what takes the time of Python's functions."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    torch.cuda.synchronize()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(40)


def trace(call: Callable[[], object], path: Path, calls: int = 3) -> None:
    """Write what host and GPU do in some calls."""
    with torch.profiler.profile() as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="flux.1-dev")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--compiler", default="")
    parser.add_argument("--loopback", type=int, default=0)
    given = parser.parse_args()
    inductor.load_config({name: True for name in given.compiler.split(",") if name})
    if given.loopback:
        device = loopback.start(given.loopback)
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    model, example = load(given.model, device)
    for way in given.ways.split(","):
        mode, transport = way.split("/")
        options: dict[str, Any] = {"mode": mode, "transport": transport, "ulysses": dist.get_world_size()}
        ported = xir.port(model, **options)

        def call(ported: Any = ported) -> object:
            return ported(**example)

        with torch.inference_mode():
            for _ in range(4):
                call()
            torch.cuda.synchronize()
            if given.trace:
                trace(call, given.trace / f"{mode}_{transport}_{dist.get_rank()}.json.gz")
            elif given.profile and dist.get_rank() == dist.get_world_size() - 1:
                profile(call)
            elif given.profile:
                for _ in range(10):
                    call()
            else:
                returned, done = measure(call, device)
                if dist.get_rank() == 0:
                    print(f"{way:20s} returns after {returned:6.1f} ms, done after {done:6.1f} ms", flush=True)
        ported.reset()
        torch._dynamo.reset()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

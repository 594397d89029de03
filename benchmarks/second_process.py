"""What the host does for a first call, and for further shapes, in a process that finds its code on disk, without GPUs:
`python benchmarks/second_process.py`.

The denoiser of FLUX.1-dev with all of its 57 layers, narrow, on two gloo processes with one thread each, compiled. Two
groups of processes run one after the other, with a cache on disk that is empty before the first. Prints seconds of
processor time of the first rank, which does not count what compilers in other processes take, or waiting.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import further_shapes
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.models.build import build

SHAPES = ((256, 256, 64), (192, 256, 64), (208, 304, 96))  # height, width, tokens of text


def work() -> None:
    """One rank of a group."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    entry = models.entry("flux.1-dev")
    deep = {**entry.tiny, **{name: entry.full[name] for name in ("num_layers", "num_single_layers")}}
    model = build(entry.cls, deep, torch.device("cpu"), torch.float32).eval()
    example = models.load("flux.1-dev:tiny")[1]
    seconds = []
    with torch.no_grad():
        port = xir.port(model, ulysses=dist.get_world_size(), mode="compiled")
        for shape in SHAPES:
            given = further_shapes.resized(example, *shape)
            start = time.process_time()
            port(**given)
            seconds.append(time.process_time() - start)
    if dist.get_rank() == 0:
        first, *further = (f"{one:.2f}" for one in seconds)
        graphs = counters["stats"]["unique_graphs"]
        print(f"first call {first} s, further shapes {', '.join(further)} s, {graphs} graphs traced to be compiled")
    port.reset()
    dist.destroy_process_group()


def main() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        for cache in ("empty", "filled"):
            print(f"the cache is {cache}:", flush=True)
            subprocess.run([*launch, str(Path(__file__).resolve()), "--worker"], env=env, check=True)


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()

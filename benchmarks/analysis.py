"""How long it takes to trace, divide and report published sizes from the meta device: `python benchmarks/analysis.py`.

One process for each model; seconds of wall time, and the resident memory at the end. Names of the zoo may be given.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

import xdit_ir as xir
from xdit_ir import models

NAMES = ("flux.1-dev", "wan2.1-t2v-14b")


def measure(name: str) -> None:
    """Print one line for one model over `ulysses=4, ring=2`."""
    model, example = models.load(name, device="meta", dtype=torch.bfloat16)
    start = time.perf_counter()
    traced = xir.trace(model, example)
    at_trace = time.perf_counter()
    parallel = traced.parallelize(ulysses=4, ring=2)
    at_division = time.perf_counter()
    share = parallel.report().share
    end = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{name}: trace {at_trace - start:.1f} s, parallelize {at_division - at_trace:.1f} s, "
        f"report {end - at_division:.1f} s, together {end - start:.1f} s; {memory:.2f} GiB resident; "
        f"the slowest rank does {share:.4f} of the FLOPs"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
    else:
        for name in sys.argv[1:] or NAMES:
            subprocess.run([sys.executable, __file__, "--one", name], check=True)

"""Decoders of published size without GPUs: `python benchmarks/decoders.py [NAME ...]`.

Each is traced and divided over two ranks on the meta device. Printed are the seconds of processor time of both, the
part of the work and of the memory of activations (exchanges under way included) of one GPU alone that the rank with the
most has, and the number of exchanges.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from typing import Any

import torch

import xdit_ir as xir
from xdit_ir.models.decoders import DECODERS

CASES = ("wan-480p", "flux-2048px", "hunyuanvideo", "cogvideox", "hunyuanvideo-tiled")


def measured(name: str) -> str:
    """What is printed for one decoder."""
    with torch.device("meta"):
        vae: Any = DECODERS[name].made().to(torch.bfloat16)
        z = torch.randn(DECODERS[name].latents, dtype=torch.bfloat16)
    times = [time.process_time()]
    with torch.inference_mode():
        traced = xir.trace(vae.decode, {"z": z})
        times.append(time.process_time())
        divided = traced.parallelize(ulysses=2)
        times.append(time.process_time())
        alone, report = traced.parallelize().report(), divided.report()
    whole, part = (max(one.activations + one.exchanges for one in each.memory) for each in (alone, report))
    trace, division = (after - before for before, after in itertools.pairwise(times))
    exchanges = sum(one.count for one in report.collectives)
    return (
        f"{name}: trace {trace:.1f} s, division {division:.1f} s, {report.share:.3f} of the work, "
        f"{part / whole:.3f} of {whole / 2**30:.1f} GiB, {exchanges} exchanges"
    )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for case in sys.argv[1:] or CASES:
        print(measured(case), flush=True)

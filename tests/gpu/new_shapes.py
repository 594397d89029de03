"""What a further resolution or length of text costs: `python tests/gpu/new_shapes.py`, by `torchrun` on several GPUs.

FLUX.1-dev in its published size, random weights, bf16, in the mode "auto": seconds to the first output of each of six
shapes, compilations in it, seconds of the second call, which records, and milliseconds of later calls; for as many
shapes as there is time for, those of a port whose code was made for that shape alone. All ranks are looked at: code is
made by each for itself, and the others wait. Where a further shape takes long, every rank says on stderr what it is
at. Prints a line for each, writes JSON with `--output`, and ends by itself.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

import xdit_ir as xir
from xdit_ir import models

SHAPES = ((1024, 1024, 512), (1024, 768, 512), (832, 1216, 512), (1024, 1024, 256), (1008, 1008, 512), (768, 1344, 333))
LIMIT = 150  # seconds
ALONE = 60  # of these, what code for one more shape alone may take at most
SLOW = 4  # of a further shape, after which ranks say what they are at


def inputs(height: int, width: int, text: int, example: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """FLUX's for an image of this size and so many tokens of text."""
    rows, columns = height // 16, width // 16
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in example.items()}
    image, words = given["hidden_states"], given["encoder_hidden_states"]
    generator = torch.Generator(device).manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": image.dtype, "generator": generator}
    return given | {
        "hidden_states": torch.randn(1, rows * columns, image.shape[-1], **kind),
        "encoder_hidden_states": torch.randn(1, text, words.shape[-1], **kind),
        "img_ids": torch.cat([torch.zeros(rows * columns, 1), place], 1).to(given["img_ids"]),
        "txt_ids": torch.zeros(text, 3).to(given["txt_ids"]),
    }


def first(port: nn.Module, given: dict[str, Any]) -> tuple[float, int]:
    """Seconds to an output, and graphs that were compiled for it here, be they kept on disk or not."""
    before = counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    start = time.perf_counter()
    port(**given)
    torch.cuda.synchronize()
    return time.perf_counter() - start, counters["stats"]["unique_graphs"] - before


@contextmanager
def told_where(seconds: float) -> Iterator[None]:
    """Say on stderr what all threads of this rank are at, if something takes longer than this."""
    timer = threading.Timer(seconds, faulthandler.dump_traceback)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def most(values: Sequence[float], device: torch.device) -> list[float]:
    """Of each, that of the rank with the most."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def steady(port: nn.Module, given: dict[str, Any]) -> float:
    """Milliseconds of a call, the median of ten."""
    port(**given)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        port(**given)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Measure and print on this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--model", default="flux.1-dev")
    options = parser.parse_args()
    began = time.perf_counter()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    degrees = {"ulysses": ranks} if ranks > 1 else {}
    model, example = models.load(options.model, device=str(device), dtype=torch.bfloat16, seed=0)
    model = model.eval()
    results: list[dict[str, Any]] = []

    def say(result: dict[str, Any]) -> None:
        results.append(result)
        if rank == 0:
            print(json.dumps(result), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(results, indent=1) + "\n")

    def is_time() -> bool:
        """Whether there is time for one more port; all ranks say the same."""
        [spent] = most([time.perf_counter() - began], device)
        return LIMIT - spent > ALONE

    with torch.no_grad():
        port = xir.port(model, mode=options.mode, **degrees)
        given = [inputs(*shape, example, device) for shape in SHAPES]
        for shape, one in zip(SHAPES, given, strict=True):
            with told_where(SLOW if results else LIMIT):
                seconds, compiled = most(first(port, one), device)
            second, _ = first(port, one)
            memory = round(torch.cuda.memory_reserved(device) / 2**30, 2)
            took = {"first_s": round(seconds, 2), "second_s": round(second, 2)}
            say({"shape": shape, **took, "compiled": int(compiled), "reserved_gib": memory})
        shared = [steady(port, one) for one in given]
        for shape, milliseconds in zip(SHAPES, shared, strict=True):
            say({"shape": shape, "steady_ms": round(milliseconds, 2)})
        say({"runs": port.report().execution, "after_s": round(time.perf_counter() - began, 1)})
        for shape, one in zip(SHAPES, given, strict=True):
            if not is_time():
                break
            with mock.patch("xdit_ir.emission.shared.lift", lambda structure, _: structure.numbers):
                other = xir.port(model, mode=options.mode, **degrees)
                seconds, compiled = most(first(other, one), device)
                first(other, one)
                alone, again = steady(other, one), steady(port, one)
            other.reset()
            say(
                {
                    "shape": shape,
                    "alone_first_s": round(seconds, 2),
                    "alone_ms": round(alone, 2),
                    "shared_ms": round(again, 2),
                    "ratio": round(again / alone, 4),
                    "compiled": int(compiled),
                }
            )
        port.reset()
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()

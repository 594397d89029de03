"""One process of `bench --pipeline`: a whole image or video by phase, alone and ported, the outputs compared.

Started by `xdit-ir bench --pipeline` under torchrun; the first process writes the JSON, and all end after `--limit`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.degrees import Degrees, parse
from xdit_ir.generation.generate import parts_of
from xdit_ir.generation.job import choose_device
from xdit_ir.generation.meter import Meter, summary, watching
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.transport.distributed import BACKENDS

# The largest relative error of an output that is called equal: what bf16 does to a pipeline of a few steps.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def main() -> None:
    """Measure the pipeline named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pipeline")
    parser.add_argument("--degrees", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=540)
    args = parser.parse_args()
    threading.Thread(target=_end_after, args=(args.limit,), daemon=True).start()
    device = choose_device(None)
    dist.init_process_group(BACKENDS[device.type])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe, call = models.load_pipeline(args.pipeline, device=device, dtype=dtype)
    call["num_inference_steps"] = args.steps
    document = {"pipeline": args.pipeline, "ranks": dist.get_world_size(), "torch": torch.__version__}
    document |= {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "steps": args.steps}
    [degrees] = parse(args.degrees)
    failed = False
    for found in contenders(pipe, call, degrees, args.samples, device, LIMITS[dtype]):
        document |= found
        failed |= found.get("status", "equal") != "equal"
        if dist.get_rank() == 0:
            args.out.write_text(json.dumps(document, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(int(failed))  # communicators that CUDA graphs recorded would wait for each other


def _end_after(seconds: float) -> None:
    """End the process, whatever it waits for; what was measured until then is written."""
    if not threading.Event().wait(seconds):
        print(f"not done in {seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(1)


def contenders(
    pipe: Any, call: Mapping[str, Any], degrees: Degrees, samples: int, device: torch.device, limit: float
) -> Any:
    """What is found of the pipeline alone, and then of it ported; equal if it differs by no more than `limit`."""
    want, alone = _measured(pipe, call, samples, device)
    yield {"alone": alone}
    xir.port(pipe, **degrees.as_dict())
    got, ported = _measured(pipe, call, samples, device)
    error = relative_error([got], [want])
    told = {"ported": ported, "degrees": str(degrees), "error": float(error), "parts": parts_of(pipe)}
    yield told | {"status": "equal" if error <= limit else "different"}


def _measured(pipe: Any, call: Mapping[str, Any], samples: int, device: torch.device) -> tuple[torch.Tensor, Any]:
    """The output, and seconds by phase of so many calls behind a first one."""
    runs: list[dict[str, dict[str, float]]] = []
    output: Any = None
    for _ in range(samples + 1):
        if dist.is_initialized():
            dist.barrier()
        meter = Meter(device)
        with watching(pipe, meter):
            output = pipe(generator=torch.Generator().manual_seed(0), **call)
        runs.append(meter.as_dict())
    [tensor] = tensors_of(output.to_tuple())
    return tensor.float(), {"first": summary(runs[:1]), "seconds": summary(runs[1:])}


if __name__ == "__main__":
    main()

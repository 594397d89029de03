"""Memory told in advance and used, on one GPU or several: `python tests/gpu/memory.py [MODEL@WAY ...]`.

Ports published configurations with a few of their blocks and random bf16 weights, each way in new processes, and
compares `report().memory` with `torch.cuda.max_memory_allocated` of each rank's own process, over all calls, or from
the second on, where the model gives its weights up at the first. A line for each way, of the rank that is furthest off;
status 1 if any is off by more than a tenth. A way is degrees, as many processes as they say, with `+compiled`,
`+recorded` (eager otherwise), `+sharded`, `+stream`, `+stream=1GiB`, `+release`, or a quantisation of the weights,
`+int8` or `+casting`. Processes share a GPU where there are too few (`staged.py`). Several ways run at a time.
Workspaces of libraries (cuBLAS takes 32 MiB and more) are not told, nor are pools of recordings between calls counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import lanes

BLOCKS, CALLS, OFF = 4, 4, 0.1
WAYS = {
    "flux.1-dev": (
        *("u1", "u1+compiled", "u1+recorded", "u1+stream", "u1+stream=1GiB", "u1+stream+compiled", "u1+int8"),
        *("u2", "u2+compiled", "r2", "t2", "u2+sharded", "u2+stream", "p2+release"),
    ),
    "wan2.1-t2v-14b": ("u1", "u1+stream", "u2"),
    "qwen-image": ("u1", "u1+casting", "u2+sharded"),
    "sd3.5-large": ("u1+recorded", "c2"),
}


def int8(model: Any) -> None:
    """Integers with a scale a row, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def casting(model: Any) -> None:
    """Stored in fp8, cast by diffusers' hooks."""
    import torch

    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


QUANTISED: dict[str, Callable[[Any], None]] = {"int8": int8, "casting": casting}


def tried(name: str, way: str, _: str) -> lanes.Result:
    """What was told and used at a model in a way, of the rank that is furthest off."""
    import parity
    import torch
    import torch.distributed as dist
    from torch.utils import _pytree as pytree

    import xdit_ir as xir

    start, device, rank = time.monotonic(), torch.device("cuda", torch.cuda.current_device()), dist.get_rank()
    options: dict[str, Any] = {"mode": "eager", **lanes.degrees_of(way), **lanes.options_of(way, QUANTISED)}
    model, example = parity.load(name, device, blocks=BLOCKS)
    for word in set(way.split("+")[1:]) & {*QUANTISED}:
        QUANTISED[word](model.requires_grad_(False))
    gives_up = {"stream_weights", "shard_weights", "tensor", "release"} & {*options}
    torch.cuda.reset_peak_memory_stats()
    port = xir.port(model, **options)
    with torch.inference_mode():
        for call in range(CALLS):
            step = (example["timestep"] * 0.9**call).to(example["timestep"].dtype)
            pytree.tree_leaves(port(**(example | {"timestep": step})))[0].float().cpu()
            if call == 0 and gives_up:  # until then the model had all weights on the GPU
                torch.cuda.reset_peak_memory_stats()
    report = port.report()
    pairs = torch.zeros(dist.get_world_size(), 2, dtype=torch.float64, device=device)
    pairs[rank, 0], pairs[rank, 1] = report.memory[rank].total, torch.cuda.max_memory_allocated()
    dist.all_reduce(pairs)
    ratios = (pairs[:, 0] / pairs[:, 1]).tolist()
    worst = max(range(len(ratios)), key=lambda one: abs(ratios[one] - 1))
    said = f"{ratios[worst]:.3f}: told {report.memory[worst]}, used {pairs[worst, 1].item() / 2**20:.1f} MiB"
    said += f" (rank {worst}), in {time.monotonic() - start:.0f} s"
    port.reset()
    return {
        "status": "equal" if abs(ratios[worst] - 1) <= OFF else "different",
        "ratio": ratios[worst],
        "reason": said,
        "runs": "" if options["mode"] == "eager" else report.execution,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        lanes.work(tried, *json.loads(sys.argv[2]))
    parser = lanes.arguments(__doc__, degrees="u1", lanes=4, fresh=True)
    parser.set_defaults(ranks=0, timeout=120)
    given = parser.parse_args()
    cases = given.names or [f"{name}@{way}" for name, ways in WAYS.items() for way in ways]
    sys.exit(lanes.share_out(given, sorted(cases, key=lambda case: "@u1" not in case)))

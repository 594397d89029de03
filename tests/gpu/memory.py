"""Memory told in advance and used: `torchrun --standalone --nproc-per-node 2 tests/gpu/memory.py [eager] [auto]`.

Ports published configurations with a few of their blocks and random bf16 weights, in every way below, and compares
`report().memory` of this rank with `torch.cuda.max_memory_allocated` over all calls, or from the second on, where the
model gives its weights up at the first: a line for each. Workspaces of libraries (cuBLAS takes 32 MiB and more) are not
told, nor are pools of recordings between calls counted. Ends with status 1 if one of the eager ones is off by more than
a tenth; and by itself.
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
from torch.utils import _pytree as pytree

import xdit_ir as xir

LIMIT = 540  # seconds
BLOCKS, CALLS, OFF = 4, 4, 0.1
GIVEN_UP = {"stream_weights", "shard_weights", "tensor", "release"}
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [
        ("flux.1-dev", {"ulysses": 1}),
        ("flux.1-dev", {"stream_weights": True, "ulysses": 1}),
        ("wan2.1-t2v-14b", {"ulysses": 1}),
        ("wan2.1-t2v-14b", {"stream_weights": True, "ulysses": 1}),
        ("flux.1-dev", {"stream_weights": "1GiB", "ulysses": 1}),
    ],
    2: [
        ("flux.1-dev", {"ulysses": 2}),
        ("flux.1-dev", {"ulysses": 2, "mode": "graph"}),
        ("flux.1-dev", {"ring": 2}),
        ("flux.1-dev", {"tensor": 2}),
        ("flux.1-dev", {"ulysses": 2, "shard_weights": True}),
        ("flux.1-dev", {"ulysses": 2, "stream_weights": True}),
        ("flux.1-dev", {"ulysses": 2, "stream_weights": "1GiB"}),
        ("flux.1-dev", {"pipefusion": 2, "release": True}),
        ("wan2.1-t2v-14b", {"ulysses": 2}),
        ("sd3.5-large", {"cfg": 2}),
    ],
}


def compare(name: str, options: dict[str, Any], mode: str, device: torch.device) -> bool:
    """Print a line of the table; whether what was told is near enough."""
    gc.collect()  # what was measured before
    torch.cuda.empty_cache()
    model, example = parity.load(name, device, blocks=BLOCKS)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    options = {"mode": mode, **options}
    port = xir.port(model, **options)
    with torch.inference_mode():
        for call in range(CALLS):
            time = (example["timestep"] * 0.9**call).to(example["timestep"].dtype)
            pytree.tree_leaves(port(**(example | {"timestep": time})))[0].float().cpu()
            if call == 0 and GIVEN_UP & set(options):  # until then the model had all weights on the GPU
                torch.cuda.reset_peak_memory_stats()
    told, used = port.report().memory[dist.get_rank()], torch.cuda.max_memory_allocated()
    print(
        f"rank {dist.get_rank()} {name} {options}: told {told}, used {used / 2**20:.1f} MiB "
        f"({before / 2**20:.1f} before), {told.total / used:.3f}; reserved {torch.cuda.memory_reserved() / 2**20:.1f}",
        flush=True,
    )
    port.reset()
    return options["mode"] != "eager" or abs(told.total / used - 1) <= OFF


def main() -> int:
    """All cases for this number of ranks, in every mode that is named."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    device = staged.start()
    cases = [(*case, mode) for mode in sys.argv[1:] or ["eager"] for case in CASES[dist.get_world_size()]]
    good = [compare(name, options, mode, device) for name, options, mode in cases]
    print(f"rank {dist.get_rank()}: {sum(good)} of {len(good)} are near enough", flush=True)
    dist.destroy_process_group()
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())

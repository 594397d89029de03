"""A counter of FLOPs around a port: `torchrun --nproc-per-node 2 tests/gpu/watched.py`.

Under it operators run one by one, on one rank or on both, whatever the mode; with it away, graphs are replayed again.
Prints a line for each check; status 1 if one does not hold.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import staged
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import relative_error

# The ranks on which a counter watches, call by call.
CALLS = ((0, 1), (), (), (0,), (1,), (0, 1), ())


def main() -> int:
    """Run the checks on this rank."""
    rank = int(os.environ["LOCAL_RANK"])
    device = staged.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, example = models.load("plain-mmdit:tiny", seed=0)
    model = model.to(device).eval()
    inputs = {name: value.to(device) for name, value in example.items()}
    checks = {}
    with torch.no_grad():
        want = model(**inputs)
        for mode in ("auto", "graph", "compiled", "eager"):
            port = xir.port(model, ulysses=2, mode=mode)
            for number, watching in enumerate(CALLS):
                with FlopCounterMode(display=False) if rank in watching else nullcontext() as counter:
                    got = port(**inputs)
                checks[f"{mode}, call {number} is right"] = relative_error([got], [want]) < 2e-4
                if counter is not None:
                    checks[f"{mode}, call {number} is counted"] = counter.get_total_flops() > 0
            port.reset()
    for name, holds in checks.items():
        print(f"rank {rank}: {'holds' if holds else 'FAILS'}: {name}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

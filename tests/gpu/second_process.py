"""The first call in a second process on the same machine: `python tests/gpu/second_process.py --ranks 2`.

FLUX.1-dev in its published size, random weights, bf16, Ulysses, in the mode "auto". Two groups of processes run one
after the other, with a cache of compiled code on disk that is empty before the first: seconds to the first output, to
that of another shape, what was found in the caches, and how many graphs were traced to be compiled. Prints a line for
each group, and ends by itself; status 1 if the second one compiled anything, or took longer than `--bar` seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 240  # seconds for each group
SHAPES = ((1024, 1024, 512), (832, 1216, 512))


def measured(name: str, mode: str, rank: int, ranks: int) -> dict[str, Any]:
    """What the first calls of one process take."""
    import new_shapes
    import torch
    from torch._dynamo.utils import counters

    import xdit_ir as xir
    from xdit_ir import models

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    model, example = models.load(name, device=str(device), dtype=torch.bfloat16, seed=0)
    given = [new_shapes.inputs(*shape, example, device) for shape in SHAPES] if "flux.1" in name else [example]
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        port = xir.port(model.eval(), mode=mode, **({"ulysses": ranks} if ranks > 1 else {}))
        seconds = [new_shapes.first(port, one)[0] for one in given]
        again = [new_shapes.first(port, one)[0] for one in given]  # which record
    whole = time.perf_counter() - start
    found = {f"{part}.{key}": count for part in ("aot_autograd", "inductor") for key, count in counters[part].items()}
    caches = {key: count for key, count in found.items() if "cache" in key}
    caches["traced"] = counters["stats"]["unique_graphs"]  # none, where code is loaded as it was kept
    result = {"first_s": round(seconds[0], 2), "others_s": [round(one, 2) for one in seconds[1:]]}
    result |= {"second_calls_s": [round(one, 2) for one in again]}
    result |= {"whole_s": round(whole, 2), "caches": caches, "runs": port.report().execution}
    port.reset()
    return result


def work(name: str, mode: str) -> None:
    """One rank of a group."""
    import torch.distributed as dist

    faulthandler.dump_traceback_later(LIMIT - 10, exit=True)
    rank, ranks = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    result = measured(name, mode, rank, ranks)
    if rank == 0:
        print(json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def group(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a group of processes with their caches in `folder` says."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [*launch, str(Path(__file__).resolve()), "--worker", options.model, "--mode", options.mode]
    done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    if done.returncode:
        raise SystemExit(f"a group of processes ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def missed(result: dict[str, Any]) -> int:
    """How often something had to be compiled."""
    return sum(count for key, count in result["caches"].items() if key.endswith(("_miss", "_bypass")))


def main() -> int:
    """Run both groups; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("model", nargs="?", default="flux.1-dev")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--bar", type=float, default=8.0, help="seconds for the second process's first call")
    options = parser.parse_args()
    if options.worker:
        work(options.model, options.mode)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for which in ("empty", "filled"):
            results.append(group(options, folder))
            print(json.dumps({"cache": which} | results[-1]), flush=True)
    return int(missed(results[1]) > 0 or results[1]["first_s"] > options.bar)


if __name__ == "__main__":
    sys.exit(main())

"""Plans about memory on real GPUs: `torchrun --standalone --nproc-per-node 2 tests/gpu/fits.py [MODEL@DEGREES ...]`.

Each way is planned, and run in a process of its own on every rank, with a limit on what PyTorch may allocate: under the
least memory that the plan calls fitting, it must run; under so little that the plan calls it too large by more than a
tenth, it must not. A line for each; status 1 if one is not so. `DEGREES` as in `u2`, with `+sharded` or `+stream`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import lanes

WAYS = {
    1: ("flux.1-dev@u1", "flux.1-dev@u1+stream", "wan2.1-t2v-1.3b@u1", "pixart-sigma@u1"),
    2: ("flux.1-dev@u2", "flux.1-dev@u2+sharded", "flux.1-dev@t2", "wan2.1-t2v-1.3b@u2", "pixart-sigma@c2"),
}
LIMIT = 170  # seconds of one way
RAN, TOO_LARGE, LOST = 0, 9, 8  # statuses; lost: another rank of the job was out of memory
# What libraries and the exchange of handles take besides, which plans leave a part of the memory for.
USED, EXCESS = 0.92, 1.1


def main(ways: list[str]) -> int:
    """Every way, twice."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    bad = 0
    for number, way in enumerate(ways or WAYS[world]):
        needed = _planned(way, world)
        for place, (limit, wanted) in enumerate(((needed / USED, RAN), (needed / USED / EXCESS / 1.01, TOO_LARGE))):
            status = _run(way, limit, 29600 + 2 * number + place)
            bad += status not in ({RAN} if wanted == RAN else {TOO_LARGE, LOST})
            what = {RAN: "ran", TOO_LARGE: "out of memory", LOST: "the other rank was out of memory"}.get(
                status, f"failed ({status})"
            )
            if rank == 0:
                print(f"{way:24s} planned {needed:6.2f} GiB, limit {limit:6.2f}: {what}", flush=True)
    return 1 if bad else 0


def _planned(way: str, gpus: int) -> float:
    """GiB of the fullest rank."""
    import torch

    import xdit_ir as xir
    from xdit_ir import models

    name, degrees, options = _parts(way)
    model, example = models.load(name, device="meta", dtype=torch.bfloat16)
    made = xir.plan(model, example, gpus=gpus, machine="h200", memory=1e6, **degrees, **options)
    return max(made.chosen.gib)


def _parts(way: str) -> tuple[str, dict[str, int], dict[str, Any]]:
    """Model, degrees (all of them, so that nothing else is planned) and options."""
    from xdit_ir.degrees import parse

    name, _, rest = way.partition("@")
    degrees = parse(rest.partition("+")[0])[0].mesh.degrees
    return name, degrees, {"shard_weights": False, **lanes.options_of(rest)}


def _run(way: str, limit: float, port: int) -> int:
    """A new process of this rank, in a job with those of the others."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    command = [sys.executable, __file__, "--worker", json.dumps([way, limit])]
    try:
        return subprocess.run(command, env=env, timeout=LIMIT, check=False).returncode
    except subprocess.TimeoutExpired:
        return -1


def work(way: str, limit: float) -> int:
    """Three calls of a port under a limit; the status that says what became of them."""
    import torch

    import xdit_ir as xir
    from xdit_ir import models

    name, degrees, options = _parts(way)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    held = bool({"shard_weights", "stream_weights"} & {key for key, value in options.items() if value})
    given_up = held or degrees["tensor"] > 1
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    try:
        if not given_up:  # else the model has all weights until the first call
            torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
        model, example = models.load(name, seed=0, device=str(device), dtype=torch.bfloat16)
        port = xir.port(model, **degrees, **options)
        with torch.inference_mode():
            for call in range(3):
                port(**example)
                torch.cuda.synchronize()
                if call == 0 and given_up:
                    torch.cuda.empty_cache()
                    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    except torch.OutOfMemoryError:
        return TOO_LARGE
    except xir.XditError as error:
        return TOO_LARGE if "out of memory" in str(error) else LOST
    return RAN


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        status = work(*json.loads(sys.argv[2]))
        sys.stdout.flush()
        os._exit(status)  # peers may wait for a rank that is out of memory
    sys.exit(main(sys.argv[1:]))

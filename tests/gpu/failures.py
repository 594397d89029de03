"""Failures and disagreement on GPUs: `torchrun --nproc-per-node 2 tests/gpu/failures.py`, or `... failures.py p2 c2`
for some of the ways to run only.

For each way to run: a rank that raises inside a forward makes the other raise, other inputs are found at the next call
at the latest, a barrier of the caller's may stand between calls, and afterwards everything is right again; groups are
given back. At the end, what the comparison costs a call on the host. A way that takes longer than `LIMIT` ends both
ranks, which then say where they are.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from typing import Any

import staged
import torch
import torch.distributed as dist

import xdit_ir as xir
from xdit_ir import models

WAYS: dict[str, dict[str, Any]] = {
    "u2-eager": {"ulysses": 2, "mode": "eager"},
    "u2": {"ulysses": 2},
    "u2-peer": {"ulysses": 2, "transport": "peer", "mode": "eager"},
    "u2-collective": {"ulysses": 2, "cuda_graph": True, "transport": "collective"},
    "p2": {"pipefusion": 2, "patches": 2},
    "p2-eager": {"pipefusion": 2, "patches": 2, "mode": "eager"},
    "c2": {"cfg": 2, "mode": "eager"},
}
LIMIT = 200  # seconds for each
RANK = int(os.environ["RANK"])
BAD: list[str] = []


def check(way: dict[str, Any], what: str, right: bool, text: object = "") -> None:
    """Note what is not as it should be."""
    if not right:
        BAD.append(f"{way} {what}")
    print(f"rank {RANK} {'ok' if right else 'WRONG'} {way} {what} {text}", flush=True)


def failing(run: Any) -> Exception | None:
    """What it raises."""
    try:
        run()
        torch.cuda.synchronize()
    except Exception as error:
        return error
    return None


def bomb(*_: Any) -> None:
    """For a rank that fails."""
    raise ArithmeticError("injected")


@torch.no_grad()
def one(way: dict[str, Any], model: Any, example: dict[str, Any]) -> None:
    """All of it, for one way to run."""
    port, want = xir.port(model, **way, timeout=60), model(**example)[0]

    def close(got: torch.Tensor) -> float:
        return float((got - want).norm() / want.norm())

    last = [port(**example)[0] for _ in range(3)][-1]
    dist.barrier()
    again = port(**example)[0]
    check(way, "barrier", max(close(last), close(again)) < 1e-3)
    start = time.monotonic()
    other = example | {"hidden_states": example["hidden_states"] * (1 + 1e-2 * RANK)}
    error = failing(lambda: (port(**other), port(**example)))
    check(way, "other inputs", isinstance(error, xir.MismatchError), f"{time.monotonic() - start:.1f} s {error!r:.160}")
    check(way, "right again", close(port(**example)[0]) < 1e-3)
    start = time.monotonic()
    if RANK and way.get("mode") == "eager":
        for body in port._xdit_specialisations.found[0].runner.bodies.values():
            body.module.register_forward_pre_hook(bomb)
    elif RANK:
        port._xdit_specialisations.found[0].runner.run = bomb
    error = failing(lambda: (port(**example)[0].sum().item(), port(**example)))
    fits = isinstance(error, ArithmeticError if RANK else xir.LostError)
    check(way, "raise inside", fits, f"{time.monotonic() - start:.1f} s {error!r:.160}")
    start = time.monotonic()
    check(way, "right after", close(port(**example)[0]) < 1e-3, f"{time.monotonic() - start:.1f} s")
    if "pipefusion" not in way:
        measure(way, port, example)
    counts = []
    for _ in range(3):
        port.reset()
        port(**example)
        counts.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    check(way, "gives back", counts[-1][0] <= counts[0][0] + 1, counts)
    port.reset()


def measure(way: dict[str, Any], port: Any, example: dict[str, Any]) -> None:
    """Host time of the comparison."""
    one = port._xdit_specialisations
    runner, agreement = one.found[0].runner, one.factory.agreement
    inputs, weights = runner.bind((), example)
    times = []
    for step in range(40):
        x = example | {"hidden_states": example["hidden_states"] + step, "timestep": example["timestep"] + step}
        inputs, weights = runner.bind((), x)
        torch.cuda.synchronize()
        with one.factory.context.communicator.working():
            start = time.perf_counter()
            agreement.call(runner, inputs, weights, dict)
            times.append(1e3 * (time.perf_counter() - start))
    print(f"rank {RANK} {way} comparison, median of {len(times)}: {sorted(times)[len(times) // 2]:.3f} ms", flush=True)


def main() -> int:
    """All ways, or those that are named."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    device = staged.start()
    torch.set_grad_enabled(False)
    for name in sys.argv[1:] or WAYS:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        one(WAYS[name], *models.load("flux.1-dev:tiny", device=device))
    print(f"rank {RANK}: {len(BAD)} wrong {BAD}", flush=True)
    dist.destroy_process_group()
    return len(BAD)


if __name__ == "__main__":
    sys.exit(main())

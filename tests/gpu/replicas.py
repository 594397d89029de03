"""Replicas on four GPUs, or branches of guidance on two: `torchrun --nproc-per-node 4 tests/gpu/replicas.py`, or 2.

Two replicas of u2, in the default mode, make calls of other numbers and shapes, each with NCCL groups of its own
members; two calls over cfg=2, and three samples, equal one GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

import xdit_ir as xir
from xdit_ir import models

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LOCAL = int(os.environ["LOCAL_RANK"])


def check(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Print whether they are equal."""
    error = ((got - want).norm() / want.norm()).item()
    print(f"rank {RANK} {'ok' if error < 2e-4 else 'WRONG'} {what} {error:.1e}", flush=True)


@torch.no_grad()
def main() -> None:
    """Each process makes the same."""
    torch.cuda.set_device(LOCAL)
    model, example = models.load("plain-dit:tiny")
    model, example = model.cuda(), {name: value.cuda() for name, value in example.items()}
    options: dict[str, Any] = {"ulysses": 2, "data": 2} if WORLD == 4 else {"cfg": 2}
    port = xir.port(model, **options)
    mine = xir.replica(port)
    other = {name: torch.cat([value, value[:1]]) for name, value in example.items()}
    for place in range(3 + mine.index):
        given = other if place == 1 else example
        given = given | {"x": given["x"] + mine.index}
        check(f"{options} call {place}", port(**given), model(**given))
    if WORLD == 2:
        one = [{name: value[place : place + 1] for name, value in example.items()} for place in (0, 1)]
        for _ in range(2):
            found = [port(**given) for given in one]
            check("two calls", torch.cat(found), torch.cat([model(**given) for given in one]))
    port.reset()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""PipeFusion on two GPUs: `torchrun --standalone --nproc-per-node 2 tests/gpu/pipefusion.py`.

Images of four Euler steps, made by tiny models in float32, equal those of `simulate_steps`: by copy engines and over
NCCL, eager, compiled and recorded, and again in the same buffers after another image. Exit status 1 if one differs.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import staged
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram
from xdit_ir.ir.difference import tensors_of
from xdit_ir.pipelined import channels

CASES = [
    ("pixart-sigma", {"pipefusion": 2, "patches": 4}),
    ("flux.1-dev", {"pipefusion": 2, "patches": 2}),
    ("flux.1-dev", {"pipefusion": 2, "patches": 4}),
]
MODES: list[dict[str, bool]] = [
    {},
    {"compile": True},
    {"cuda_graph": True},
    {"compile": True, "cuda_graph": True},
]
LATENTS, STEPS, TOLERANCE = "hidden_states", 4, 3e-5
Example = dict[str, Any]


def euler(latents: torch.Tensor, output: Any) -> torch.Tensor:
    """The latents of the next step."""
    tensor = tensors_of(output)[0]
    return latents - tensor.narrow(1, 0, latents.shape[1]) / STEPS


@torch.no_grad()
def image(forward: Callable[..., Any], example: Example) -> torch.Tensor:
    """The latents after all steps."""
    given = dict(example)
    for _ in range(STEPS):
        given[LATENTS] = euler(given[LATENTS], forward(**given))
    torch.cuda.synchronize()  # whoever waits for the device must not hold up what other ranks wait for
    return given[LATENTS].cpu()


def expected(parallel: ParallelProgram, model: torch.nn.Module, example: Example) -> torch.Tensor:
    """The same by `simulate_steps`."""
    steps: list[Example] = [dict(example)]
    for _ in range(STEPS):
        output = parallel.simulate_steps(model, steps)[-1][0]
        steps.append(example | {LATENTS: euler(steps[-1][LATENTS], output)})
    return steps[-1][LATENTS]


def check(name: str, degrees: dict[str, int], device: torch.device) -> bool:
    """Run every mode over both kinds of channels; print and judge the errors."""
    model, example = models.load(f"{name}:tiny")
    noise = torch.randn(example[LATENTS].shape, generator=torch.Generator().manual_seed(1))
    examples = [example, example | {LATENTS: noise}]
    parallel = xir.trace(model, example).parallelize(**degrees)
    wanted = [expected(parallel, model, one) for one in examples]
    model.to(device)
    reachable, good = channels.peers_reachable, True
    for peers, mode in itertools.product((True, False), MODES):
        channels.peers_reachable = reachable if peers else lambda communicator: False
        ported, errors = xir.port(model, **degrees, **mode), []
        for place in (0, 1, 0):
            given = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), examples[place])
            errors.append(((image(ported, given) - wanted[place]).norm() / wanted[place].norm()).item())
        good = good and max(errors) <= TOLERANCE
        if dist.get_rank() == 0:
            print(
                name, degrees, "copy engines" if peers else "NCCL", mode, [f"{one:.1e}" for one in errors], flush=True
            )
    channels.peers_reachable = reachable
    return good


def main() -> None:
    """All cases on this rank."""
    device = staged.start()
    good = [check(name, degrees, device) for name, degrees in CASES]
    dist.barrier()
    sys.stdout.flush()
    os._exit(0 if all(good) else 1)  # communicators that graphs recorded would wait for each other when destroyed


if __name__ == "__main__":
    main()

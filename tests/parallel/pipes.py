"""Jobs about PipeFusion: what every rank does; each returns plain data for the test to judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jobs import Degrees, _plain, relative_error
from torch import nn
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.runtime.deferred import Deferred

LATENTS = "hidden_states"


def _inputs(example: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Other latents and timesteps at every step, as in denoising."""
    make = torch.Generator().manual_seed(7)
    found = [example]
    for _ in range(steps - 1):
        last = found[-1]
        noise = torch.randn(last[LATENTS].shape, generator=make)
        time = last["timestep"] * 0.9 if last["timestep"].is_floating_point() else last["timestep"] - 40
        found.append(last | {LATENTS: last[LATENTS] + 0.3 * noise, "timestep": time})
    return found


def _tensor(output: Any) -> torch.Tensor:
    [found] = [leaf for leaf in pytree.tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor)]
    return found


def _following(latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """These latents, made from an output of the model."""
    for dim, size in enumerate(latents.shape):
        output = output.narrow(dim, 0, size)
    return latents + 0 * output


@torch.no_grad()
def _run(module: Callable[..., Any], inputs: list[dict[str, Any]]) -> list[Any]:
    """The outputs of consecutive steps of one request, read only at the end."""
    outputs: list[Any] = []
    for given in inputs:
        latents = _following(given[LATENTS], _tensor(outputs[-1])) if outputs else given[LATENTS]
        outputs.append(module(**given | {LATENTS: latents}))
    return outputs


def emitted_steps(name: str, degree_sets: list[Degrees], steps: int = 4) -> list[dict[str, Any]]:
    """Per set of degrees: the error of every step against the simulation, and how far the last step is from exact."""
    torch.set_num_threads(1)
    model, example = models.load(f"{name}:tiny")
    inputs, traced, found = _inputs(example, steps), xir.trace(model, example), []
    with torch.no_grad():
        exact = model(**inputs[-1])
    for degrees in degree_sets:
        parallel = traced.parallelize(**degrees)
        want = parallel.simulate_steps(model, inputs)
        got = _run(parallel.emit(model), inputs)
        errors = [relative_error(mine, step[dist.get_rank()]) for mine, step in zip(got, want, strict=True)]
        deferred = all(isinstance(_tensor(output), Deferred) for output in got)
        found.append({"errors": errors, "stale": relative_error(got[-1], exact), "deferred": deferred})
    return found

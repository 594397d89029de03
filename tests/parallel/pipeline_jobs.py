"""Jobs about whole pipelines: what every rank does; each returns plain data for the test to judge."""

from __future__ import annotations

from typing import Any

import pipelines
import torch
from jobs import Degrees, _plain
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir.runtime.port import Ported


def run(pipe: Any, call: dict[str, Any], steps: int = 2) -> torch.Tensor:
    """The latents that a pipeline ends with."""
    pipe.set_progress_bar_config(disable=True)
    result = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call)
    [latents] = [leaf for leaf in pytree.tree_leaves(_plain(result)) if isinstance(leaf, torch.Tensor)]
    return latents.float()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error, relative to the largest value."""
    return ((got - want).abs().max() / want.abs().max()).item()


def whole_pipelines(name: str, degree_sets: list[Degrees], steps: int = 2) -> list[dict[str, Any]]:
    """Per set of degrees: how far a ported pipeline is from itself on one process, and what was made."""
    torch.set_num_threads(1)
    pipe, call = pipelines.BUILDERS[name]()
    want, found = run(pipe, call, steps), []
    for degrees in degree_sets:
        pipe, call = pipelines.BUILDERS[name]()
        xir.port(pipe, **degrees)
        got = run(pipe, call, steps)
        ported = [component for component in pipe.components.values() if type(component) is Ported]
        programs = [len(component.programs) for component in ported]
        found.append({"error": error(got, want), "spread": want.std().item(), "programs": programs})
    return found

"""The zoo's tiny models, each traced once for all the sets of degrees that come one behind the other."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.ir.difference import relative_error, tensors_of


@dataclass
class Loaded:
    """A model, its program, and what it gives by itself."""

    model: nn.Module
    example: dict[str, Any]
    traced: TracedProgram
    want: list[torch.Tensor]

    def assert_equal(self, parallel: ParallelProgram) -> None:
        """Every rank's output is the model's."""
        for rank, output in enumerate(parallel.simulate(self.model, copy.deepcopy(self.example))):
            assert relative_error(tensors_of(output), self.want) <= 1e-5, f"rank {rank}"


@functools.lru_cache(maxsize=1)
def load(name: str) -> Loaded:
    """The tiny model of this name."""
    model, example = models.load(f"{name}:tiny")
    traced, given = xir.trace(model, example), copy.deepcopy(example)  # caches are written to
    with torch.no_grad():
        return Loaded(model, example, traced, tensors_of(model(**given)))

"""The zoo's tiny models, each traced once for all the sets of degrees that come one behind the other."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch

from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.tools.survey import Subject


@dataclass
class Loaded:
    """A model, its program, and what it gives by itself."""

    model: Any
    example: dict[str, Any]
    traced: TracedProgram
    want: list[torch.Tensor]
    tolerance: float

    def assert_equal(self, parallel: ParallelProgram) -> None:
        """Every rank's output is the model's, up to what a model that rounds inside is off from itself."""
        for rank, output in enumerate(parallel.simulate(self.model, copy.deepcopy(self.example))):
            assert relative_error(tensors_of(output), self.want) <= self.tolerance, f"rank {rank}"


@functools.lru_cache(maxsize=1)
def load(name: str) -> Loaded:
    """The tiny model of this name."""
    subject = Subject(name)
    given = copy.deepcopy(subject.example)  # caches are written to
    with torch.no_grad():
        want = tensors_of(subject.model(**given))
    return Loaded(subject.model, subject.example, subject.traced, want, subject.tolerance)

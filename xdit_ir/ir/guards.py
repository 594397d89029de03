"""What a program has burned in of its inputs and of the model; calls for which it is otherwise are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

STATE = "@"  # before the names of buffers among the paths of guards
STRIDES = "strides of "  # before the paths of inputs, of which not the contents are meant
ASKED = "torch."  # before the names of functions of PyTorch, of which the answer is meant


@dataclass(frozen=True)
class Guard:
    """A fact about the inputs that the program has burned in: the leaf at `path` has the value `value`.

    `value` is a CPU tensor when the leaf is a tensor whose contents were read while tracing. With `STATE` before its
    name, `path` is a buffer of the model that was read.
    """

    path: str
    value: Any
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Predicate:
    """A fact computed from inputs that the program has burned in: `graph`, run on the leaves at `paths`, gives `value`.

    For what Python reads of floating-point inputs: the program stays good while the summary that was read, not the
    contents, is the same. `constants` are the values of the graph's `get_attr`s.
    """

    graph: fx.Graph
    paths: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    value: torch.Tensor
    reason: str = ""

"""What forward leaves behind besides its result, as values of a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

ITSELF = "<model>"  # where paths of effects begin that lead into the model, not into an argument


@dataclass(frozen=True)
class Literal:
    """An output leaf that is not a tensor."""

    value: Any


@dataclass(frozen=True)
class PathEntry:
    """One step into an argument: the entry `key` of a list or dict, or the `attribute` of an object."""

    key: Any
    attribute: bool = False

    def __str__(self) -> str:
        return f".{self.key}" if self.attribute else f"[{self.key!r}]"


@dataclass(frozen=True)
class Effect:
    """What forward leaves in an object, list or dict that it was given, in a tensor inside of one, or in the model.

    `path` leads there from the dict of forward's arguments, in which `ITSELF` is the model. Where `write`, the tensor
    there gets the contents of `leaves[0]`; else the entry becomes the tree of `leaves`, which are as in
    `Signature.out_leaves`, or is removed if `spec` is None.
    """

    path: tuple[PathEntry, ...]
    leaves: tuple[int | Literal, ...] = ()
    spec: pytree.TreeSpec | None = None
    write: bool = False

"""What this rank has of weights that are stored in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Stored, TensorSpec
from xdit_ir.ir.stored import runs_of
from xdit_ir.reflection.versions import Versions

AllStored = Mapping[str, Stored]
NOTHING: AllStored = MappingProxyType({})
_DTYPE, _IS_META = attrgetter("dtype"), attrgetter("is_meta")


def whole_names(names: Iterable[str], stored: AllStored) -> list[str]:
    """Those of weights that are held whole."""
    return [name for name in names if name not in stored]


@dataclass
class StoredParts:
    """Parts by what is stored, so that all programs that store weights in the same way share them."""

    tensors: dict[Stored, torch.Tensor] = field(default_factory=dict)

    def lacking(self, names: Iterable[str], stored: AllStored) -> list[Stored]:
        """What of these names is not here yet."""
        return list(dict.fromkeys(stored[n] for n in names if n in stored and stored[n] not in self.tensors))

    def members(self, names: Iterable[str], specs: Mapping[str, TensorSpec], stored: AllStored) -> Iterator[str]:
        """The weights of which bytes are needed for what is not here yet."""
        runs = (run.name for one in self.lacking(names, stored) for run in runs_of(one, specs))
        return iter(dict.fromkeys(runs))


class GivenUp:
    """Places of a model that have no values, as its port holds them: what is loaded there would have no effect, nor
    would a cast."""

    def __init__(self, places: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        self._places = places
        self._versions = Versions(list({id(holder): holder for holder, _ in places.values()}.values()))
        self._tensors = [holder[leaf] for holder, leaf in places.values()]
        self._dtypes = list(map(_DTYPE, self._tensors))

    def check(self) -> None:
        """Raise `MismatchError` if one has values again, or was cast."""
        if self._versions.changed():
            now = [holder.get(leaf) for holder, leaf in self._places.values()]
            self._tensors = [old if new is None else new for old, new in zip(self._tensors, now, strict=True)]
            self._versions.accept()
        if list(map(_DTYPE, self._tensors)) == self._dtypes and all(map(_IS_META, self._tensors)):
            return
        for name, tensor, dtype in zip(self._places, self._tensors, self._dtypes, strict=True):
            if not tensor.is_meta:
                raise MismatchError(without_effect(f"{name} was loaded into"))
            if tensor.dtype != dtype:
                raise MismatchError(without_effect(f"{name} was cast from {dtype} to {tensor.dtype} in"))


HELD = (
    "a model whose weights its port holds itself (release=True, weights=, shard_weights=True, stream_weights=True or "
    "tensor=)"
)


def without_effect(what: str) -> str:
    """Why weights cannot be changed where a port holds them."""
    return f"{what} {HELD}, where it has no effect; load, cast and fuse before the first forward, or port a model anew"


def not_saved() -> str:
    """Why there is no state dict where a port holds the weights."""
    return (
        f"state_dict() of {HELD}: the model has no values any more, and each rank has its parts of them only; save "
        "before the first forward, or copy the checkpoint"
    )

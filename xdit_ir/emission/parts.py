"""What this rank has of weights that are stored in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType

import torch

from xdit_ir.errors import MismatchError
from xdit_ir.ir.named_tensors import Place
from xdit_ir.ir.program import Stored, TensorSpec
from xdit_ir.ir.stored import runs_of
from xdit_ir.reflection.versions import Versions

AllStored = Mapping[str, Stored]
NOTHING: AllStored = MappingProxyType({})
_DTYPE, _WRITES = attrgetter("dtype"), attrgetter("_version")


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

    def holds(self, name: str) -> bool:
        """Whether parts of a weight are here, for whatever program."""
        return any(name == member for one in self.tensors for member, _ in one.members)

    def members(self, names: Iterable[str], specs: Mapping[str, TensorSpec], stored: AllStored) -> Iterator[str]:
        """The weights of which bytes are needed for what is not here yet."""
        runs = (run.name for one in self.lacking(names, stored) for run in runs_of(one, specs))
        return iter(dict.fromkeys(runs))


class GivenUp:
    """Places of a model whose values its port holds, and which may have none any more: what is loaded or written there
    would have no effect, nor would a cast."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self._versions = Versions(list({id(holder): holder for holder, _ in places.values()}.values()))
        self._accept([holder[leaf] for holder, leaf in places.values()])

    def _accept(self, tensors: list[torch.Tensor]) -> None:
        self._tensors, self._dtypes = tensors, list(map(_DTYPE, tensors))
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]  # others count no writes
        self._writes = list(map(_WRITES, self._counted))

    def check(self) -> None:
        """Raise `MismatchError` if one has other values, or was cast; values may go."""
        if self._versions.changed():
            now = [holder.get(leaf) for holder, leaf in self._places.values()]
            for name, old, new, dtype in zip(self._places, self._tensors, now, self._dtypes, strict=True):
                _check_place(name, old, new, dtype)
            self._accept([old if new is None else new for old, new in zip(self._tensors, now, strict=True)])
            self._versions.accept()
        if list(map(_DTYPE, self._tensors)) != self._dtypes:
            for name, tensor, dtype in zip(self._places, self._tensors, self._dtypes, strict=True):
                _check_place(name, tensor, tensor, dtype)
        if list(map(_WRITES, self._counted)) != self._writes:
            written = {id(one) for one, seen in zip(self._counted, self._writes, strict=True) if one._version != seen}
            name = next(name for name, one in zip(self._places, self._tensors, strict=True) if id(one) in written)
            raise MismatchError(without_effect(f"{name} was loaded into, or written to, in"))


def _check_place(name: str, old: torch.Tensor, new: torch.Tensor | None, dtype: torch.dtype) -> None:
    if new is None:
        return
    if new is not old and not new.is_meta:
        raise MismatchError(without_effect(f"{name} was loaded into"))
    if new.dtype != dtype:
        raise MismatchError(without_effect(f"{name} was cast from {dtype} to {new.dtype} in"))


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

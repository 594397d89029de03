"""Weights that one rank holds for itself: read from a checkpoint, or taken from a loaded model."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn

from xdit_ir.emission.checkpoint import Checkpoint
from xdit_ir.emission.parts import NOTHING, AllStored, GivenUp, StoredParts, whole_names
from xdit_ir.emission.state import check_type
from xdit_ir.errors import MismatchError
from xdit_ir.ir.named_tensors import Place, find_tensor, named_tensors
from xdit_ir.ir.program import TensorSpec
from xdit_ir.ir.stored import Filling, Room, bytes_of
from xdit_ir.ir.wrappers import hollow_like, parts_inside
from xdit_ir.transport.uploads import room_beside

OTHERWISE = (
    ". Parts that are divided along cfg too serve calls that divide the batch, and others those that are paired; for "
    "both, shard_weights='ulysses' or another mesh dim"
)


class FixedWeights:
    """Tensors that do not change, in the order of a program's names; stands where `WeightReferences` does."""

    places = None  # nobody puts others there

    def __init__(self, tensors: Sequence[torch.Tensor], given_up: GivenUp) -> None:
        self._tensors, self._given_up = list(tensors), given_up

    def fetch(self) -> list[torch.Tensor]:
        """The tensors; raises `MismatchError` if others were loaded in the meantime where that has no effect."""
        self._given_up.check()
        return list(self._tensors)


@dataclass
class WeightStore:
    """The weights of this rank, for all programs made of `model`.

    With a `checkpoint` they are read from there, except for those it lacks and the model has (buffers that are not
    saved); otherwise they are the model's own. `release`: the model gives its tensors up one by one and is left on the
    meta device: what this rank uses moves here, the rest is dropped. The model is not changed in any other way.
    Of what programs store in parts, this rank has its own.
    """

    model: nn.Module
    device: torch.device
    checkpoint: Checkpoint | None = None
    release: bool = False
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    _parts: StoredParts = field(default_factory=StoredParts)
    _given_up: GivenUp | None = None

    def check(self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored = NOTHING) -> None:
        """Raise `MismatchError` unless `take` can give all of these; reads no data, and the index anew, so that a
        checkpoint can be mended and what needs it be called again."""
        if self.checkpoint is not None:
            self.checkpoint = Checkpoint(self.checkpoint.path)
        if self._given_up is not None:
            self._given_up.check()
        for name in (*whole_names(names, stored), *self._parts.members(names, specs, stored)):
            if name in self._tensors:
                check_type(name, self._tensors[name], specs[name])
            elif self.checkpoint is not None and self._saved(name):
                self.checkpoint.check(self._saved_as(name), specs[name])
            else:
                self._own(name, specs[name])

    def take(
        self,
        names: Sequence[str],
        specs: Mapping[str, TensorSpec],
        stored: AllStored = NOTHING,
        room: Room | None = None,
    ) -> FixedWeights:
        """The tensors of these names, on the device; each is read or moved once, one after the other. Those that are
        `stored` in parts are this rank's, and get `room`."""
        self.check(names, specs, stored)
        whole = whole_names(names, stored)
        wanted = {name for name in whole if name not in self._tensors}
        parts = Filling(self._parts.lacking(names, stored), specs, room or room_beside(self.device))
        if self.release:
            gc.collect()  # cycles that a trace left behind hold the model's tensors, which would pile up below
        for names_of_it, places in named_tensors(self.model) if self.release else ():
            holder, leaf = places[0]
            for name in (name for path in names_of_it for name, _ in parts_inside(path, holder[leaf])):
                if not self._saved(name):
                    if name in wanted:
                        self._tensors[name] = self._own(name, specs[name]).detach().to(self.device)
                    parts.fill(name, partial(self._bytes, name, specs))
            _drop(places)
        for name in parts.wanted:
            parts.fill(name, partial(self._bytes, name, specs))
        self._parts.tensors |= parts.done()
        if self._given_up is None:
            pairs = [pair for found in named_tensors(self.model) for pair in zip(*found, strict=True)]
            kept = {name: place for name, place in pairs if place[0][place[1]].is_meta or self._is_read(name, place)}
            self._given_up = GivenUp(kept)
        for name in whole:
            if name not in self._tensors and self.checkpoint is not None and self._saved(name):
                self._tensors[name] = self.checkpoint.read(self._saved_as(name), specs[name], self.device)
            elif name not in self._tensors:
                self._tensors[name] = self._own(name, specs[name]).detach().to(self.device)
        tensors = [self._parts.tensors[stored[n]] if n in stored else self._tensors[n] for n in names]
        return FixedWeights(tensors, self._given_up)

    def originals(
        self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored
    ) -> dict[str, torch.Tensor]:
        """Of the weights of which `take` is going to store parts, those that the model has: all of each."""
        members = [name for one in self._parts.lacking(names, stored) for name, _ in one.members]
        return {name: self._own(name, specs[name]) for name in members if not self._saved(name)}

    def _bytes(self, name: str, specs: Mapping[str, TensorSpec], start: int, length: int) -> torch.Tensor:
        if name in self._tensors:
            return bytes_of(self._tensors[name]).narrow(0, start, length)
        if self.checkpoint is not None and self._saved(name):
            return self.checkpoint.read_bytes(self._saved_as(name), specs[name], start, length)
        return bytes_of(self._own(name, specs[name])).narrow(0, start, length)

    def _saved(self, name: str) -> bool:
        """Whether the checkpoint has to have it: it does, or the model has nothing either."""
        return self.checkpoint is not None and (
            self.checkpoint.called(self._saved_as(name)) in self.checkpoint.files or self._find(name) is None
        )

    def _is_read(self, name: str, place: Place) -> bool:
        """Whether what lies in a place of the model, or some part of it, is not used but read from the checkpoint."""
        return any(self._saved(part) for part, _ in parts_inside(name, place[0][place[1]]))

    def _saved_as(self, name: str) -> str:
        """Under which of its names the checkpoint has a tensor of the model: files have those with several once."""
        assert self.checkpoint is not None
        files, called = self.checkpoint.files, self.checkpoint.called
        return next((one for one in self._names.get(name, (name,)) if called(one) in files), name)

    @cached_property
    def _names(self) -> Mapping[str, Sequence[str]]:
        """All names of each tensor of the model that has several, beginning with this one."""
        found: dict[str, Sequence[str]] = {}
        for paths, [(holder, leaf), *others] in named_tensors(self.model):
            inside = [[name for name, _ in parts_inside(path, holder[leaf])] for path in (paths if others else ())]
            for names in zip(*inside, strict=True):
                found |= {name: (name, *names) for name in names}
        return found

    def _find(self, name: str) -> torch.Tensor | None:
        found = find_tensor(self.model, name)
        return None if found.is_meta else found

    def _own(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._find(name)
        if found is None:
            raise MismatchError(
                f"{name} has no values: the model is on the meta device, or gave it up (release=True) when it was made "
                "parallel before; load, quantise and add adapters before the first forward, or give weights=, the "
                f"folder of a checkpoint{OTHERWISE if self._parts.holds(name) else ''}"
            )
        check_type(name, found, spec)
        return found


def _drop(places: Sequence[Place]) -> None:
    """Leave the shape and dtype only of a tensor, and that it is one."""
    holder, leaf = places[0]
    tensor = holder[leaf]
    if tensor.is_meta:
        return
    hollow = hollow_like(tensor)
    hollow.requires_grad_(tensor.requires_grad)
    for held, key in places:
        held[key] = hollow

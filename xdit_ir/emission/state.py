"""A model's parameters and buffers, used by reference: found once, then read from the modules' own dicts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.odd_weights import odd_weight_tensor
from xdit_ir.emission.parts import NOTHING, AllStored
from xdit_ir.errors import MismatchError
from xdit_ir.ir.named_tensors import Place, way_to
from xdit_ir.ir.program import TensorSpec
from xdit_ir.ir.stored import Room
from xdit_ir.ir.wrappers import bare, form_of, is_dressed, is_wrapper
from xdit_ir.reflection.tensor_types import TensorTypes
from xdit_ir.reflection.versions import Versions


@dataclass(eq=False)
class ModelWeights:
    """The weights of a model on `device`, which its programs use by reference; stands where `WeightStore` does.

    `last`: what was taken last, which programs of other shapes take too.
    """

    model: nn.Module
    device: torch.device
    last: WeightReferences | None = None

    def check(self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored = NOTHING) -> None:
        """Raise `MismatchError` unless `take` can give all of these."""
        self.take(names, specs, stored)

    def take(
        self,
        names: Sequence[str],
        specs: Mapping[str, TensorSpec],
        stored: AllStored = NOTHING,
        room: Room | None = None,
    ) -> WeightReferences:
        """The tensors of these names; nothing is made that would need `room`."""
        if parts := [name for name in names if name in stored]:
            raise MismatchError(
                f"{parts[0]} is a part of weights, and the model has all of each: parts are no references; expected "
                "release=True or weights=, as with shard_weights=True"
            )
        if self.last is None or not self.last.are(names, specs):
            self.last = WeightReferences(self.model, names, specs, self.device)
        return self.last

    def originals(
        self, names: Sequence[str], specs: Mapping[str, TensorSpec], stored: AllStored
    ) -> dict[str, torch.Tensor]:
        """Nothing is stored in parts."""
        return {}

    def held(self, specs: Mapping[str, TensorSpec]) -> WeightReferences:
        """All of these that are here, whoever uses them."""
        here = [name for name in specs if not _tensor(self.model, name).is_meta]
        return WeightReferences(self.model, here, specs, self.device)


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    holder, key = way_to(model, name)[-1]
    found: torch.Tensor = holder[key]
    return found


class WeightReferences:
    """The tensors called `names` in `model`, read anew by each `fetch`, so that reloaded weights take effect. `places`:
    the dicts that hold them, as `fetch` has seen them.

    Args:
        specs: the shape and dtype that a program needs of each.
        device: where the program runs.

    Raises:
        MismatchError: a name is missing, has another shape or dtype, or is not on `device`.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], specs: Mapping[str, TensorSpec], device: torch.device
    ) -> None:
        self.names, self._device = list(names), device
        self._specs = [specs[name] for name in names]
        ways = self._find(model)
        self._model = model if self._wrappers else None
        self._forms = self._forms_now()
        above = {(id(holder), key): (holder, key) for way in ways for holder, key in way[:-1]}.values()
        self._above = [(holder, key) for holder, key in above if not isinstance(holder[key], torch.Tensor)]
        self._owners = [holder[key] for holder, key in self._above]
        self.places = Versions(self._counted)
        self._plain: dict[int, torch.Tensor] = {}
        self._tensors = self._read()
        self._types = TensorTypes(self._tensors)
        for name, tensor in zip(names, self.fetch(), strict=True):
            _check_device(name, tensor, device)

    def are(self, names: Sequence[str], specs: Mapping[str, TensorSpec]) -> bool:
        """Whether these are the tensors of such names and types, still."""
        if self.names != list(names) or self._specs != [specs[name] for name in names]:
            return False
        try:
            self.fetch()
        except MismatchError:
            return False
        return True

    def _find(self, model: nn.Module) -> list[list[Place]]:
        """Where the tensors are now: the ways to them."""
        ways = [way_to(model, name) for name in self.names]
        self._places = [way[-1] for way in ways]
        tensors = ((place, place[0][place[1]]) for way in ways for place in way)
        odd = {id(tensor): place for place, tensor in tensors if is_wrapper(tensor) or is_dressed(tensor)}
        self._wrappers = list(odd.values())
        self._parts = [vars(holder[key]) for holder, key in self._wrappers]
        holders = list(
            {id(one): one for one in (*(holder for way in ways for holder, _ in way), *self._parts)}.values()
        )
        self._counted = [holder for holder in holders if type(holder) is dict]
        self._all_counted = len(self._counted) == len(holders)
        return ways

    def _forms_now(self) -> list[Any]:
        return [form_of(holder[key]) for holder, key in self._wrappers]

    def fetch(self) -> list[torch.Tensor]:
        """The tensors, in the order of their names; raises `MismatchError` if the program no longer fits them."""
        changed = self.places.changed() or not self._all_counted or self._plain
        if changed or any(vars(holder[key]) is not held for (holder, key), held in self._opened()):
            self._tensors = self._read()
            self.places.accept()
        tensors = self._tensors
        if not self._types.same(tensors):
            for name, tensor, spec in zip(self.names, tensors, self._specs, strict=True):
                check_type(name, tensor, spec)
            self._types = TensorTypes(tensors)
        if tensors and tensors[0].device != self._device:
            raise MismatchError(f"the model moved from {self._device} to {tensors[0].device}")
        return tensors

    def _read(self) -> list[torch.Tensor]:
        try:
            replaced = any(map(is_not, [holder[key] for holder, key in self._above], self._owners))
        except LookupError:
            replaced = True
        if replaced:
            raise MismatchError("modules of the model were replaced since it was traced")
        if self._model is not None:
            self._find(self._model)
            self.places.held = self._counted
            if self._forms_now() != self._forms:
                raise MismatchError("weights of the model were quantised in another way since it was traced")
        try:
            tensors = [holder[key] for holder, key in self._places]
        except LookupError as error:
            raise MismatchError(f"parameter or buffer {error} of the model was removed") from error
        for name, tensor, spec in zip(self.names, tensors, self._specs, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise MismatchError(f"parameter or buffer {name!r} of the model was removed: it is {tensor!r}")
            check_type(name, tensor, spec)
        return [self._undressed(place, tensor) for place, tensor in enumerate(tensors)]

    def _opened(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Tensors of several, and what lay in their attributes."""
        return zip(self._wrappers, self._parts, strict=True)

    def _undressed(self, place: int, tensor: torch.Tensor) -> torch.Tensor:
        """The plain tensor in a dressed one: the same object as long as it lies in the same memory."""
        plain = bare(tensor)
        if plain is tensor:
            return tensor
        before = self._plain.get(place)
        if before is None or before.data_ptr() != plain.data_ptr() or before.device != plain.device:
            before = self._plain[place] = plain
        return before


def check_type(name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Raise `MismatchError` unless a tensor of the model has the shape and dtype that a program needs."""
    if (why := odd_weight_tensor(f"parameter {name}", tensor)) is not None:
        raise MismatchError(why)
    if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
        raise MismatchError(
            f"parameter {name}: the program needs {spec.dtype}{list(spec.shape)}, "
            f"the model has {tensor.dtype}{list(tensor.shape)}"
        )


def _check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device.type == "meta":
        raise MismatchError(f"{name} is on the meta device; load weights first, then emit the module")
    if tensor.device != device:
        raise MismatchError(f"{name} is on {tensor.device} and the module runs on {device}; move the model there")


def hooked(model: nn.Module) -> str | None:
    """The first module around whose forward accelerate has put a hook, which moves weights; None without any."""
    found = (path for path, module in model.named_modules() if "_hf_hook" in vars(module))
    return next((path or type(model).__name__ for path in found), None)


def running_device(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """Where to run: `device`, or where the model is; raises `MismatchError` if the model has no weights yet.

    Some may be on the meta device: those that other ranks have.
    """
    devices = (tensor.device for tensor in itertools.chain(model.parameters(), model.buffers()))
    first = next(devices, torch.device("cpu"))
    found = first if first.type != "meta" else next((one for one in devices if one.type != "meta"), first)
    if found.type == "meta" and (where := hooked(model)) is not None:
        raise MismatchError(
            f"weights are moved to the device piece by piece, by hooks of accelerate ({where}), which a parallel "
            "program does not call; offload whole modules (`enable_model_cpu_offload`), or give weights="
        )
    if found.type == "meta":
        raise MismatchError("the model is on the meta device: load weights first (`to_empty` and `load_state_dict`)")
    if device is None:
        return found
    wanted = torch.device(device)
    if wanted.type == "cuda" and wanted.index is None:
        wanted = torch.device("cuda", torch.cuda.current_device())
    return wanted

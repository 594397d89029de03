"""A model's parameters and buffers, used by reference: found once, then read from the modules' own dicts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import TensorSpec


class StaleError(MismatchError):
    """The model's modules, or shapes, dtypes or device of its weights, are no longer those of the program."""


class Weights:
    """The tensors called `names` in `model`, read anew by each `fetch`, so that reloaded weights take effect.

    Args:
        specs: the shape and dtype that a program needs of each.
        device: where the program runs.

    Raises:
        MismatchError: a name is missing, has another shape or dtype, or is not on `device`.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], specs: Mapping[str, TensorSpec], device: torch.device
    ) -> None:
        self._names, self._device = list(names), device
        self._places: list[tuple[Any, str]] = []
        self._edges: list[tuple[dict[str, nn.Module | None], str]] = []
        self._modules: list[nn.Module | None] = []
        owners: dict[str, nn.Module] = {"": model}
        for name in names:
            owner, _, leaf = name.rpartition(".")
            self._places.append((_holder(self._owner(owner, owners, name), leaf, name), leaf))
        self._shapes = [torch.Size(specs[name].shape) for name in names]
        self._dtypes = [specs[name].dtype for name in names]
        for name, tensor in zip(names, self.fetch(), strict=True):
            _check_device(name, tensor, device)

    def _owner(self, path: str, owners: dict[str, nn.Module], name: str) -> nn.Module:
        """The module at `path`; notes every step on the way there."""
        if path not in owners:
            above, _, leaf = path.rpartition(".")
            parent = self._owner(above, owners, name)
            child = parent._modules.get(leaf)
            if child is None:
                raise MismatchError(f"the model has no parameter or buffer {name!r} that its program uses")
            self._edges.append((parent._modules, leaf))
            self._modules.append(child)
            owners[path] = child
        return owners[path]

    def fetch(self) -> list[torch.Tensor]:
        """The tensors, in the order of their names; raises `StaleError` if the program no longer fits them."""
        if [modules.get(name) for modules, name in self._edges] != self._modules:
            raise StaleError("modules of the model were replaced since it was traced")
        try:
            tensors: list[torch.Tensor] = [holder[leaf] for holder, leaf in self._places]
            fits = [x.dtype for x in tensors] == self._dtypes and [x.shape for x in tensors] == self._shapes
        except (KeyError, AttributeError) as error:
            raise StaleError(f"parameter or buffer {error} of the model was removed") from error
        if not fits:
            self._complain(tensors)
        if tensors and tensors[0].device != self._device:
            raise StaleError(f"the model moved from {self._device} to {tensors[0].device}")
        return tensors

    def _complain(self, tensors: Sequence[torch.Tensor]) -> None:
        for name, tensor, shape, dtype in zip(self._names, tensors, self._shapes, self._dtypes, strict=True):
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise StaleError(
                    f"parameter {name}: the program needs {dtype}{list(shape)}, "
                    f"the model has {tensor.dtype}{list(tensor.shape)}"
                )


def _holder(module: nn.Module, leaf: str, name: str) -> Any:
    for holder in (module._parameters, module._buffers, module.__dict__):
        if isinstance(holder.get(leaf), torch.Tensor):
            return holder
    raise MismatchError(f"the model has no parameter or buffer {name!r} that its program uses")


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
    devices = [tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())]
    found = next((one for one in devices if one.type != "meta"), devices[0] if devices else torch.device("cpu"))
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

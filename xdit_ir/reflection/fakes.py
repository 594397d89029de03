"""The fake tensors of a trace. To the model's code they are of the class that its own tensors are of, so that
`type(x) is torch.Tensor` holds; they are PyTorch's `FakeTensor` only while an operator runs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from xdit_ir.reflection.tensors import tensors_in

_DEVICES = ("_fake_device", "fake_device")  # what a `FakeTensor` of torch 2.13, and of 2.11, holds
_Result = TypeVar("_Result")


def is_fake(item: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a fake tensor, of whatever class."""
    return isinstance(item, FakeTensor) or (isinstance(item, torch.Tensor) and _pretended(item) is not None)


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is, or pretends to be; while no mode runs, PyTorch does not know it of a fake."""
    pretended = _pretended(tensor)
    return tensor.device if pretended is None else pretended


def _pretended(tensor: torch.Tensor) -> torch.device | None:
    held = vars(tensor)
    return next((held[name] for name in _DEVICES if name in held), None)


def as_plain(made: _Result) -> _Result:
    """Fresh fakes, as the model's code will see them."""
    _turn([tensor for tensor in tensors_in(made) if type(tensor) is FakeTensor], torch.Tensor)
    return made


def run_on_fakes(function: Callable[..., _Result], args: Any, kwargs: Any) -> _Result:
    """What a function that expects PyTorch's fakes makes of these."""
    given = [tensor for tensor in tensors_in((args, kwargs)) if type(tensor) is torch.Tensor and is_fake(tensor)]
    _turn(given, FakeTensor)
    try:
        return as_plain(function(*args, **kwargs))
    finally:
        _turn(given, torch.Tensor)


def _turn(tensors: Sequence[torch.Tensor], kind: type) -> None:
    for tensor in tensors:
        tensor.__class__ = kind

"""Tensors that are made of several (PyTorch: traceable wrapper subclasses), as quantised weights with their scales.

A program has the plain tensors inside, each called by the name of the whole and that of the part
(`proj.weight.scale`), and the operators that the wrapper runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type


class Hollow(nn.Parameter):
    """A parameter without contents, of which the version tells of writes through `.data` too."""

    @property
    def data(self) -> torch.Tensor:
        """Itself, without gradients."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        cast, same = value.dtype != self.dtype, value.untyped_storage()._cdata == self.untyped_storage()._cdata
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if not cast and not same:
            increment_version(self)


PLAIN = frozenset({torch.Tensor, nn.Parameter, Hollow, FakeTensor})  # classes of tensors that are what they look like


def is_wrapper(item: Any) -> bool:
    """Whether it is a tensor made of several, which lie in its attributes."""
    if not isinstance(item, torch.Tensor) or not is_traceable_wrapper_subclass_type(type(item)):
        return False
    names, _ = _flat(item)
    return all(name in vars(item) for name in names)


def parts_inside(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors inside, with their names; a tensor that is no wrapper is its own part."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    for part in _flat(tensor)[0]:
        yield from parts_inside(f"{name}.{part}", vars(tensor)[part])


def with_parts(tensor: torch.Tensor, made: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A wrapper like `tensor` of what is `made` of each of its parts, by name."""
    names, options = _flat(tensor)
    parts = {name: made(name, vars(tensor)[name]) for name in names}
    unflatten: Any = type(tensor).__tensor_unflatten__  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunction():
        wrapped: torch.Tensor = unflatten(parts, options, tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        wrapped._is_param = True
    return wrapped


def form_of(tensor: torch.Tensor) -> Any:
    """What a wrapper computes with besides its parts: its class and options, and those of wrappers inside; or what the
    class of a dressed tensor keeps with it. None for others."""
    if is_dressed(tensor):
        return type(tensor), dict(vars(tensor))
    if not is_wrapper(tensor):
        return None
    names, options = _flat(tensor)
    return type(tensor), tuple(tensor.shape), options, [form_of(vars(tensor)[name]) for name in names]


def is_dressed(item: Any) -> bool:
    """Whether it is a tensor of plain numbers, to which its class adds nothing but Python."""
    kind = type(item)
    if kind in PLAIN or not isinstance(item, torch.Tensor) or is_lazy(item):
        return False
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor of a dressed one, in the same memory; any other is itself."""
    if not is_dressed(tensor):
        return tensor
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(torch.Tensor)


def hollow_like(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the meta device: without contents, and of the same kind."""
    if is_wrapper(tensor):
        return with_parts(tensor, lambda name, part: hollow_like(part))
    with torch._C.DisableTorchFunction():
        meta = torch.empty_like(tensor.detach(), device="meta")
        if not is_dressed(tensor):
            return Hollow(meta, False) if isinstance(tensor, nn.Parameter) else meta
        made: torch.Tensor = torch.Tensor._make_subclass(type(tensor), meta, False)
    vars(made).update(vars(tensor))
    return made


def _flat(tensor: Any) -> tuple[list[str], Any]:
    """The names of a wrapper's parts and its options, as it says; not noticed by a trace."""
    with torch._C.DisableTorchFunction():
        flat: tuple[list[str], Any] = tensor.__tensor_flatten__()
    return flat

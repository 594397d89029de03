"""A method of a module, such as `decode` of an autoencoder, as the forward of a module of its own."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from xdit_ir.errors import TraceError

Module = nn.Module | Callable[..., Any]
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Method(nn.Module):
    """Calls `method` in forward, with its signature; parameters, buffers and submodules are those of the module that it
    belongs to, under their names."""

    def __init__(self, method: types.MethodType) -> None:
        super().__init__()
        owner = method.__self__
        for name in _SHARED:
            self.__dict__[name] = owner.__dict__[name]
        self.__dict__["forward"] = method

    @property
    def owner(self) -> nn.Module:
        """The module that the method belongs to."""
        owner: nn.Module = self.__dict__["forward"].__self__
        return owner

    @property
    def training(self) -> bool:
        """That of the owner."""
        forward = self.__dict__.get("forward")
        return forward is None or forward.__self__.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Left to the owner."""


class StandIn:
    """What is put in place of a method, on the instance: whoever looks into the module sees the `original`."""

    __slots__ = ("original",)

    def __init__(self, original: types.MethodType) -> None:
        self.original = original


def as_module(target: Any) -> nn.Module:
    """A module as it is; for a bound method of one, a module whose forward it is.

    Raises:
        TraceError: it is neither.
    """
    if isinstance(target, nn.Module):
        return target
    if isinstance(target, StandIn):
        target = target.original
    if isinstance(target, types.MethodType) and isinstance(target.__self__, nn.Module):
        if target.__name__ == "forward":
            return target.__self__
        name = f"{type(target.__self__).__name__}_{target.__name__}"
        kind: Any = type(name, (Method,), {"__module__": __name__})
        made: Method = kind(target)
        return made
    raise TraceError(f"expected a module or a method of one, such as vae.decode; got {type(target).__name__}")

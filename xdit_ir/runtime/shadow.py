"""A module that stands in for another one: same state, same attributes, another forward."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _forwarded(name: str) -> Any:
    """A method that the original executes; what returns the original returns the stand-in."""

    def method(self: Shadow, /, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._xdit_original, name)(*args, **kwargs)
        return self if result is self._xdit_original else result

    return functools.wraps(getattr(nn.Module, name))(method)


class _Forward:
    """`forward` with the signature of the original's. Not a data descriptor, so an instance may override it."""

    def __get__(self, instance: Shadow | None, owner: type[Shadow]) -> Any:
        if instance is None:
            return self
        bound = functools.partial(owner._xdit_forward, instance)
        bound.__signature__ = instance._xdit_signature  # type: ignore[attr-defined]
        return bound


class Shadow(nn.Module):
    """Stands in for `original`: shares its dicts of parameters, buffers and submodules, so names and tensors are the
    same and stay so; answers its attributes, is of its class for `isinstance`, and differs in `forward` only.

    Attributes that exist on the original are set there; hooks and new attributes belong to the stand-in.
    """

    _xdit_original: nn.Module
    _xdit_signature: inspect.Signature

    def __init__(self, original: nn.Module) -> None:
        nn.Module.__init__(self)
        del self.__dict__["training"]
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_xdit_original"] = original
        self.__dict__["_xdit_signature"] = inspect.signature(original.forward)
        self.__dict__["__module__"] = type(original).__module__

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    forward = _Forward()

    def __getattr__(self, name: str) -> Any:
        if "_xdit_original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._xdit_original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        mine = name in self.__dict__ or hasattr(type(self), name) or "_xdit_original" not in self.__dict__
        if mine or not hasattr(self._xdit_original, name):
            nn.Module.__setattr__(self, name, value)
        else:
            setattr(self._xdit_original, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._xdit_original, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's class; so no method here may use `super()` without arguments, which reads this name."""
        return type(self.__dict__.get("_xdit_original", self))

    def _get_name(self) -> str:
        return f"{type(self).__name__}:{type(self._xdit_original).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{self._get_name()} belongs to running processes; copy or save the original's state_dict()")

    state_dict = _forwarded("state_dict")
    load_state_dict = _forwarded("load_state_dict")
    _save_to_state_dict = _forwarded("_save_to_state_dict")
    _load_from_state_dict = _forwarded("_load_from_state_dict")
    _apply = _forwarded("_apply")
    to = _forwarded("to")
    cuda = _forwarded("cuda")
    cpu = _forwarded("cpu")
    half = _forwarded("half")
    float = _forwarded("float")
    double = _forwarded("double")
    bfloat16 = _forwarded("bfloat16")
    train = _forwarded("train")
    requires_grad_ = _forwarded("requires_grad_")
    extra_repr = _forwarded("extra_repr")

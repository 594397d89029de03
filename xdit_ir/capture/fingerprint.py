"""When are two modules the same code: class tree, metadata of parameters, tying, hooks and plain attributes."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn

_SKIPPED = frozenset({"_parameters", "_buffers", "_modules", "forward"})
_VALUES = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, type)


def fingerprint(module: nn.Module) -> Any:
    """A value that is equal for modules whose forward does the same up to the contents of their parameters."""
    return _Printer().print(module)


class _Printer:
    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def print(self, item: Any) -> Any:
        if isinstance(item, _VALUES):
            return (type(item), item)
        if isinstance(item, types.FunctionType):
            return item
        if id(item) in self._seen:
            return ("seen", self._seen[id(item)])
        if isinstance(item, types.MethodType):
            return ("method", item.__func__, self.print(item.__self__))
        self._seen[id(item)] = len(self._seen)
        if isinstance(item, nn.Module):
            return self._module(item)
        if isinstance(item, torch.Tensor):
            return ("tensor", type(item), tuple(item.shape), item.dtype, str(item.device), item.stride())
        if type(item) is functools.partial:
            return ("partial", self.print(item.func), self.print(item.args), self.print(item.keywords))
        if isinstance(item, (list, tuple)):
            return (type(item), tuple(self.print(entry) for entry in item))
        if isinstance(item, dict):
            return (type(item), tuple((self.print(key), self.print(entry)) for key, entry in item.items()))
        if hasattr(item, "__dict__") and type(item).__eq__ is object.__eq__:
            return (type(item), self.print(vars(item)))
        return item

    def _module(self, module: nn.Module) -> Any:
        tensors = [(name, self.print(entry)) for name, entry in (*module._parameters.items(), *module._buffers.items())]
        plain = [(name, self.print(entry)) for name, entry in module.__dict__.items() if name not in _SKIPPED]
        children = [(name, self.print(child)) for name, child in module._modules.items()]
        return (type(module), tuple(tensors), tuple(plain), tuple(children))

"""A copy of a module tree that shares no mutable Python state with it and holds fake tensors instead of weights."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MakeState = Callable[[list[str], torch.Tensor, bool], torch.Tensor]
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, type, types.FunctionType)


class Skeleton:
    """Copies a model; `paths` maps the id of a copied module to its path, `originals` to the module it copies."""

    def __init__(self, model: nn.Module, make_state: MakeState) -> None:
        self._memo: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._make_state = make_state
        self.paths: dict[int, str] = {}
        self.originals: dict[int, nn.Module] = {}
        self._names = _state_names(model)
        self._order = dict(model.named_modules())
        self.model: nn.Module = self._module(model)
        for path, module in self._order.items():
            copy = self._module(module)
            self.paths[id(copy)], self.originals[id(copy)] = path, module

    def _module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._memo:
            copy: nn.Module = self._memo[id(module)]
            return copy
        copy = module.__class__.__new__(module.__class__)
        self._remember(module, copy)
        for name, item in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                copy.__dict__[name] = {key: self._tensor(entry) for key, entry in item.items()}
            else:
                copy.__dict__[name] = self._copy(item)
        return copy

    def _remember(self, original: Any, copy: Any) -> None:
        self._memo[id(original)] = copy
        self._keep.append(original)

    def _tensor(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or id(tensor) not in self._names:
            return tensor
        if id(tensor) not in self._memo:
            parameter = isinstance(tensor, nn.Parameter)
            fake = self._make_state(self._names[id(tensor)], tensor, parameter)
            if parameter:
                fake._is_param = True  # type: ignore[attr-defined]
            self._remember(tensor, fake)
        found: torch.Tensor = self._memo[id(tensor)]
        return found

    def _copy(self, item: Any) -> Any:
        if isinstance(item, _PLAIN):
            return item
        if isinstance(item, nn.Module):
            return self._module(item)
        if isinstance(item, torch.Tensor):
            return self._tensor(item)
        if id(item) in self._memo:
            return self._memo[id(item)]
        copy = self._container(item)
        self._remember(item, copy)
        return copy

    def _container(self, item: Any) -> Any:
        kind = type(item)
        if isinstance(item, types.MethodType):
            return types.MethodType(item.__func__, self._copy(item.__self__))
        if kind is functools.partial:
            return functools.partial(
                self._copy(item.func), *map(self._copy, item.args), **{k: self._copy(v) for k, v in item.keywords.items()}
            )
        if kind in (list, set):
            return kind(self._copy(entry) for entry in item)
        if kind is tuple:
            return tuple(self._copy(entry) for entry in item)
        if isinstance(item, dict) and _copies_like_dict(kind):
            copy = item.copy()
            for key, entry in item.items():
                copy[key] = self._copy(entry)
            return copy
        if _is_plain_object(kind) and hasattr(item, "__dict__"):
            return self._object(item)
        return item

    def _object(self, item: Any) -> Any:
        copy = object.__new__(type(item))
        self._remember(item, copy)
        copy.__dict__.update({name: self._copy(entry) for name, entry in item.__dict__.items()})
        return copy


def _copies_like_dict(kind: type) -> bool:
    from collections import OrderedDict, defaultdict

    return kind in (dict, OrderedDict, defaultdict)


def _is_plain_object(kind: type) -> bool:
    """Whether instances are nothing but their `__dict__`: Python classes all the way, without slots."""
    if kind.__new__ is not object.__new__ or issubclass(kind, BaseException):
        return False
    return all(base is object or (base.__flags__ & (1 << 9) and "__slots__" not in base.__dict__) for base in kind.__mro__)


def _state_names(model: nn.Module) -> dict[int, list[str]]:
    """All qualified names of every parameter, buffer and plain tensor attribute, by identity."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        groups = (module._parameters, module._buffers, module.__dict__)
        for group in groups:
            for name, tensor in group.items():
                if isinstance(tensor, torch.Tensor):
                    names.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return names

"""When are two modules the same code: class tree, metadata of state, tying, hooks, attributes."""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_ir.ir.wrappers import form_of
from xdit_ir.reflection.fakes import device_of, is_fake
from xdit_ir.reflection.looked import Looked
from xdit_ir.reflection.looked_into import is_opaque
from xdit_ir.reflection.parts import Members, Part, parts_of
from xdit_ir.reflection.tensors import contents

_SKIPPED = frozenset({"_parameters", "_buffers", "_modules"})
TRACED = "_xdit_traced_forward"  # marks the tracer's own wrapper of a forward, and is what it wraps
_STATE = ("_parameters", "_buffers")
_CONTAINERS = frozenset({dict, OrderedDict, list, set})
_SCALARS = (str, int, float, bool, type(None))
_VALUES = (*_SCALARS, bytes, complex, torch.dtype, torch.device, torch.Size, np.generic, type)
_DIGESTED_NUMEL = 1 << 16


@dataclass(frozen=True)
class Fingerprint:
    """`structure` is equal for modules of the same code; `scalars` are plain attributes by (path, name)."""

    structure: Any
    scalars: dict[tuple[str, str], Any]

    def differs_from(self, other: Fingerprint) -> set[tuple[str, str]]:
        """The scalars in which two modules differ."""
        keys = self.scalars.keys() | other.scalars.keys()
        return {key for key in keys if self.scalars.get(key, self) != other.scalars.get(key, other)}


def fingerprint(module: nn.Module, held: Mapping[int, torch.Tensor]) -> Fingerprint:
    """What decides, apart from the contents of its parameters and buffers, what a module computes.

    `held` are the contents of constants by the id of the fake tensor that stands for them.
    """
    return Fingerprints(held).of(module)


class Fingerprints:
    """Those of modules while they are traced: made anew only where something that was looked at is another now.

    `held` as for `fingerprint`.
    """

    def __init__(self, held: Mapping[int, torch.Tensor]) -> None:
        self._held = held
        self._found: dict[int, tuple[Fingerprint, Looked]] = {}

    def of(self, module: nn.Module) -> Fingerprint:
        """That of a module as it is now."""
        with torch._C.DisableTorchFunction():  # a mode would be asked for every size
            found = self._found.get(id(module))
            if found is None or not found[1].is_so():
                printer = _Printer(self._held)
                made = Fingerprint(printer.module(module, ""), printer.scalars)
                found = self._found[id(module)] = made, printer.looked  # which keeps the module
            return found[0]

    def let_go(self) -> None:
        """Forget modules, some of which may refer to this: else all are kept until Python's collector comes by."""
        self._found.clear()


def describe(item: Any, *, closures: bool = False) -> Any:
    """A comparable description of any object; what cannot be described is equal only to itself. With `closures`, of
    functions also what they enclose, which may change."""
    return _Printer({}, closures=closures).describe(item)


def traced(item: Any) -> Any:
    """The forward that a wrapper of the tracer's stands for; anything else is itself, whatever attributes it claims."""
    held = getattr(item, "__dict__", None)
    return held.get(TRACED, item) if type(held) is dict else item


@dataclass(frozen=True, eq=False)
class _Only:
    """Equal only to a description of the very same object."""

    item: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Only) and other.item is self.item

    def __hash__(self) -> int:
        return id(self.item)


class _Printer:
    def __init__(self, held: Mapping[int, torch.Tensor], *, closures: bool = False) -> None:
        self._held, self._closures = held, closures
        self.scalars: dict[tuple[str, str], Any] = {}
        self._seen: dict[int, int] = {}
        self._forms: list[Any] = []  # so that no other object gets the ids of what they are made of
        self.looked = Looked()

    def module(self, module: nn.Module, path: str) -> Any:
        """The structure of a module; its scalars are collected."""
        if id(module) in self._seen:
            return ("seen", self._seen[id(module)])
        self._seen[id(module)] = len(self._seen)
        self.looked.at_module(module)
        state = [(key, self._state(item)) for part in _STATE for key, item in dict.items(module.__dict__[part])]
        plain = []
        for name, item in module.__dict__.items():
            kind = type(item)
            if kind in _SCALARS:
                self.scalars[path, name] = (kind, repr(item) if kind is float else item)
                continue
            if name in _SKIPPED:
                continue
            if kind in _CONTAINERS and not item:
                self.looked.empty.append(item)
                continue
            item = traced(item)
            if not _is_own(name, item, module):
                plain.append((name, self.describe(item)))
        children = [
            (name, self.module(child, f"{path}.{name}" if path else name))
            for name, child in module._modules.items()
            if child is not None
        ]
        watched = getattr(type(module), "_watched_class", type(module))
        return (watched, tuple(state), tuple(plain), tuple(children))

    def _state(self, tensor: torch.Tensor | None) -> Any:
        """A parameter or buffer: anything but its contents."""
        if tensor is None:
            return None
        first = self._seen.setdefault(id(tensor), len(self._seen))
        self._forms.append(form_of(tensor))
        self.looked.at_tensor(tensor, plain=self._forms[-1] is None)
        return (first, _form(tensor), self.describe(self._forms[-1]))

    def describe(self, item: Any) -> Any:
        if isinstance(item, _VALUES) and (isinstance(item, type) or not getattr(item, "__dict__", None)):
            return (type(item), _exact(item))
        if isinstance(item, types.FunctionType) and self._closures and id(item) not in self._seen:
            self._seen[id(item)] = len(self._seen)
            cells = (dict(part.read()) for cell in item.__closure__ or () for part in parts_of(cell, ""))
            return (_Only(item), tuple(self.describe(held) for held in (*cells, item.__defaults__, vars(item))))
        if isinstance(item, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
            return _Only(item)
        if isinstance(item, types.MethodType):
            function: Any = item.__func__
            partial = type(function) is functools.partial  # which PyTorch's own code binds, too
            return ("method", self.describe(function) if partial else _Only(function), self.describe(item.__self__))
        if isinstance(item, nn.Module):
            return self.module(item, f"<{len(self._seen)}>")
        if id(item) in self._seen:
            return ("seen", self._seen[id(item)])
        self._seen[id(item)] = len(self._seen)
        return self._object(item)

    def _object(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            self.looked.certain = False  # its contents may change
            return _tensor(self._held.get(id(item), item))
        if type(item) is functools.partial:
            return (
                "partial",
                self.describe(item.func),
                self.describe(item.args),
                self.describe(item.keywords),
            )
        if isinstance(item, weakref.ReferenceType):
            self.looked.certain = False
            return (type(item), self.describe(item()))
        if isinstance(item, types.MappingProxyType):
            return (type(item), *map(self.describe, gc.get_referents(item)))
        if isinstance(item, _VALUES):
            return (type(item), item, self.describe(vars(item)))
        if isinstance(item, tuple):
            return (type(item), tuple(map(self.describe, item)), self.describe(getattr(item, "__dict__", None)))
        if isinstance(item, frozenset):
            return (type(item), frozenset(map(self.describe, item)), self.describe(getattr(item, "__dict__", None)))
        parts = [] if is_opaque(type(item)) else parts_of(item, "")
        if not parts:
            return _Only(item)
        return (type(item), tuple(self._part(part) for part in parts))

    def _part(self, part: Part) -> Any:
        self.looked.parts.append((part, dict(part.read())))
        entries = ((self.describe(key), self.describe(entry)) for key, entry in part.read().items())
        return frozenset(entries) if isinstance(part, Members) else tuple(entries)


def _is_own(name: str, item: Any, module: nn.Module) -> bool:
    """Whether an attribute is the method of this name of the module's class."""
    own = isinstance(item, types.MethodType) and item.__self__ is module
    return own and item.__func__ is getattr(type(module), name, None)


def _exact(item: Any) -> Any:
    """A number such that it equals no other: not -0.0 0.0, but NaN itself."""
    return repr(item) if isinstance(item, (float, complex, np.floating, np.complexfloating)) else item


def _form(tensor: torch.Tensor) -> Any:
    return (type(tensor), tuple(tensor.shape), tensor.dtype, str(device_of(tensor)), tensor.stride())


def _tensor(tensor: torch.Tensor) -> Any:
    meta = _form(tensor)
    if is_fake(tensor) or tensor.device.type == "meta":
        return ("tensor", meta)
    if tensor.numel() > _DIGESTED_NUMEL:
        return ("tensor", meta, _Only(tensor))
    return ("tensor", meta, _bytes(tensor))


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = contents(tensor).contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

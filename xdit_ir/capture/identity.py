"""Who a module, weight or object is: what refers to one from outside of the model means its copy during a trace."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.skeleton import LazyState, Skeleton
from xdit_ir.reflection.atoms import VALUES, is_atom, is_plain_object
from xdit_ir.reflection.parts import Part, attributes_of
from xdit_ir.reflection.tree import modules_of

# What is no module, weight or plain object, and is not looked into here.
_OTHERS = frozenset(
    (
        *(str, bytes, bool, float, type(None), type, dict, OrderedDict, list, set, LazyState),
        *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
    )
)
NAMED = "_xdit_named"  # makes a copy equal to no other: code may ask whether it is a certain one


class Identities:
    """Entries of containers, closures and globals with copies in the place of a model's modules, weights and plain
    objects: as values, keys, owners of methods, behind weak references, and as the numbers that `id` gives."""

    def __init__(self, model: nn.Module, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._known: dict[int, tuple[Any, list[nn.Module]]] = {}
        self._own: set[int] = set()
        self._modules = modules_of(model)
        for module in self._modules:
            self._known[id(module)] = (module, [module])
            held = vars(module)
            dicts = [item for item in held.values() if type(item) not in VALUES and isinstance(item, dict)]
            self._own.update((id(held), *map(id, dicts)))
            for tensor in (*dict.values(held["_parameters"]), *dict.values(held["_buffers"])):
                if tensor is not None:
                    self._known.setdefault(id(tensor), (tensor, []))[1].append(module)
        for item in skeleton.objects:
            self._known[id(item)] = (item, [])
            self._own.add(id(attributes_of(item)))

    def exchanged(self, part: Part, held: Mapping[Any, Any]) -> dict[Any, Any] | None:
        """What a part has to hold; None if it refers to nothing of the model, or is the model's own."""
        if not held or id(part.item) in self._own or isinstance(part.item, LazyState):
            return None
        others = [one for one in chain(held, held.values()) if type(one) not in _OTHERS]
        if all(self(one) is one for one in others):
            return None
        made = {self(key): self(item) for key, item in held.items()}
        same = all(map(_is_same, made, held)) and all(map(_is_same, made.values(), held.values()))
        return None if same else made

    def __call__(self, item: Any) -> Any:
        """The copy, of what there is one of; a new object that refers to it; or the object itself."""
        kind = type(item)
        if kind is int:
            return id(self._copy(item)) if item in self._known else item
        if is_atom(item):
            return item
        if id(item) in self._known:
            return self._copy(id(item))
        if isinstance(item, (nn.Module, torch.Tensor)):
            return item
        if kind in (tuple, frozenset) or (isinstance(item, tuple) and hasattr(kind, "_make")):
            inside = [self(entry) for entry in item]
            same = all(map(_is_same, inside, item))
            return item if same else getattr(kind, "_make", kind)(inside)
        if kind is types.MethodType:
            owner = self(item.__self__)
            return item if owner is item.__self__ else types.MethodType(item.__func__, owner)
        if kind is functools.partial:
            parts = (item.func, item.args, tuple(item.keywords.values()))
            func, args, values = made = self(parts)
            keywords = dict(zip(item.keywords, values, strict=True))
            return item if made is parts else functools.partial(func, *args, **keywords)
        if isinstance(item, weakref.ReferenceType):
            referent = item()
            return item if self(referent) is referent else weakref.ref(self(referent))
        return item

    def _copy(self, identity: int) -> Any:
        item, owners = self._known[identity]
        for owner in owners or (module for module in self._modules if _holds(vars(module), item, set())):
            vars(self._skeleton.copy_of(owner)).setdefault(NAMED, object())
        return self._skeleton.copy_of(item)


def _is_same(now: Any, before: Any) -> bool:
    return now is before


def _holds(held: Any, item: Any, seen: set[int]) -> bool:
    """Whether an object is there, or in containers and plain objects that are; modules in it have their own."""
    if held is item:
        return True
    if id(held) in seen or isinstance(held, (nn.Module, torch.Tensor)) or is_atom(held):
        return False
    seen.add(id(held))
    if is_plain_object(type(held)):
        held = attributes_of(held) or {}
    entries = (
        held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple, set, frozenset)) else ()
    )
    return any(_holds(entry, item, seen) for entry in entries)

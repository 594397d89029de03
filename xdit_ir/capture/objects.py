"""Objects among the inputs: those with tensors inside as trees of their attributes, others as snapshots."""

from __future__ import annotations

import functools
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.errors import TraceError
from xdit_ir.reflection.atoms import ATOMS, is_plain_object
from xdit_ir.reflection.fingerprint import describe
from xdit_ir.reflection.looked_into import is_opaque


@dataclass(frozen=True)
class ClassMark:
    """Stands, in the dict of an object's attributes, for its class."""

    kind: type


@dataclass(frozen=True)
class Snapshot:
    """What an object without tensors was like; equal to a later one of the same class and attributes."""

    kind: type
    description: Any = field(repr=False)


_OPEN = (tuple, frozenset, functools.partial, types.MethodType, weakref.ReferenceType)


def snapshot(leaf: Any) -> Any:
    """An input that is no tensor, so that it can be compared with later ones even if it is changed in place."""
    if isinstance(leaf, (type, types.ModuleType, nn.Module, ClassMark)):
        return leaf
    if type(leaf) is torch.Generator:  # forward cannot have looked at its state
        return Snapshot(torch.Generator, str(leaf.device))
    if isinstance(leaf, ATOMS):
        return Snapshot(type(leaf), describe(leaf)) if getattr(leaf, "__dict__", None) else leaf
    if is_opaque(type(leaf)) and not isinstance(leaf, _OPEN):
        return leaf
    return Snapshot(type(leaf), describe(leaf, closures=True))


_CLASS = "__class__"


def expand_objects(tree: Any) -> Any:
    """A tree whose plain objects with tensors inside, such as caches of keys, are dicts of their attributes."""

    above: list[int] = []

    def leaf(item: Any) -> Any:
        if not _is_open(item):
            return item
        if id(item) in above:
            raise TraceError(f"an input of type {type(item).__qualname__} refers to itself; give forward its tensors")
        above.append(id(item))
        made = {name: pytree.tree_map(leaf, entry) for name, entry in vars(item).items()}
        above.pop()
        return {_CLASS: ClassMark(type(item)), **made}

    return pytree.tree_map(leaf, tree)


def _is_open(item: Any, above: tuple[int, ...] = ()) -> bool:
    if isinstance(item, (torch.Tensor, nn.Module, type)) or not is_plain_object(type(item)):
        return False
    return id(item) not in above and hasattr(item, "__dict__") and _has_tensors(item, above)


def _has_tensors(item: Any, above: tuple[int, ...]) -> bool:
    leaves = pytree.tree_leaves(vars(item))
    return any(isinstance(leaf, torch.Tensor) or _is_open(leaf, (*above, id(item))) for leaf in leaves)


def restore_objects(tree: Any) -> Any:
    """The inverse of `expand_objects`, with objects and containers of its own."""
    return pytree.tree_map(lambda item: _object(item) if _is_object(item) else item, tree, is_leaf=_is_object)


def _is_object(tree: Any) -> bool:
    return type(tree) is dict and isinstance(tree.get(_CLASS), ClassMark)


def _object(tree: dict[str, Any]) -> Any:
    made = object.__new__(tree[_CLASS].kind)
    made.__dict__.update({name: restore_objects(entry) for name, entry in tree.items() if name != _CLASS})
    return made

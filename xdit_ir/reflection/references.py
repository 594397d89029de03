"""Other functions in place of some, for a while, wherever Python modules refer to them."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Functions = Mapping[int, Callable[..., Any]]
Patch = tuple[Callable[[Any, Any, Any], None], Any, Any, Any, Any]


@contextmanager
def replaced(found: Functions, holders: Iterable[object]) -> Iterator[None]:
    """Put functions in the place of others, which are given by their ids; nothing is searched if there are none.

    `holders` are objects whose attributes are functions that may refer to them, besides what Python modules hold.
    """
    patches: list[Patch] = []
    try:
        for put, holder, key, old, new in _patches(found, holders) if found else ():
            patches.append((put, holder, key, old, new))
            put(holder, key, new)
        yield
    finally:
        for put, holder, key, old, _ in reversed(patches):
            put(holder, key, old)


def _patches(found: Functions, holders: Iterable[object]) -> Iterator[Patch]:
    """Where Python modules hold these functions: globals, classes, containers, closures and default arguments."""
    seen: set[int] = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "torch" and isinstance(module, types.ModuleType):
            for item in list(vars(module).values()):
                yield from _inside(item, found, seen)
            yield from _entries(vars(module), found)
    for holder in holders:
        for item in list(vars(holder).values()):
            if type(item) is types.FunctionType:
                yield from _inside(item, found, seen)


def _entries(holder: Any, found: Functions) -> Iterator[Patch]:
    for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        if id(item) in found:
            yield operator.setitem, holder, key, item, found[id(item)]


def _inside(item: Any, found: Functions, seen: set[int]) -> Iterator[Patch]:
    kind = type(item)
    if id(item) in seen or not (kind in (dict, list, types.FunctionType) or issubclass(kind, type)):
        return
    seen.add(id(item))
    if kind in (dict, list):
        yield from _entries(item, found)
    elif kind is types.FunctionType:
        yield from _held_by_function(item, found, seen)
    else:
        for name, entry in list(vars(item).items()):
            held = entry.__func__ if isinstance(entry, staticmethod) else entry
            if id(held) in found:
                yield setattr, item, name, entry, staticmethod(found[id(held)])
            elif not isinstance(held, type):
                yield from _inside(held, found, seen)


def _held_by_function(function: types.FunctionType, found: Functions, seen: set[int]) -> Iterator[Patch]:
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if id(held) in found:
            yield setattr, cell, "cell_contents", held, found[id(held)]
        else:
            yield from _inside(held, found, seen)
    defaults = function.__defaults__ or ()
    if any(id(item) in found for item in defaults):
        yield setattr, function, "__defaults__", defaults, tuple(found.get(id(item), item) for item in defaults)
    yield from _entries(function.__kwdefaults__ or {}, found)

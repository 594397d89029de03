"""Caches outside the model that its code fills, such as `lru_cache`: no fake tensor may stay there."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.reflection.fakes import is_fake
from xdit_ir.reflection.tree import modules_of

_CACHED = type(functools.lru_cache(lambda: None))


@contextmanager
def clean_caches(model: nn.Module) -> Iterator[None]:
    """Undo what the model's code puts into caches: `lru_cache`s that were missed are emptied."""
    reachable = list(_reachable(model))
    cached = [item for item in reachable if isinstance(item, _CACHED)]
    before = [item.cache_info().misses for item in cached]
    try:
        yield
    finally:
        for item, misses in zip(cached, before, strict=True):
            if item.cache_info().misses != misses:
                item.cache_clear()
        for store in reachable:
            if type(store) is dict:
                for key in [key for key, entry in list(store.items()) if _holds_fakes(entry)]:
                    del store[key]


def _holds_fakes(entry: Any) -> bool:
    if is_fake(entry):
        return True
    return type(entry) in (tuple, list, dict) and any(map(is_fake, pytree.tree_leaves(entry)))


def _reachable(model: nn.Module) -> Iterator[Any]:
    """Caches and dicts in the Python modules of the model's code, what they import, and their classes."""
    names = {kind.__module__ for module in modules_of(model) for kind in type(module).__mro__}
    names = {name for name in names if name.partition(".")[0] not in ("torch", "builtins")}
    seen: set[int] = set()
    for name in names:
        if name not in sys.modules:
            continue  # code that was executed without being imported
        for item in list(vars(sys.modules[name]).values()):
            if isinstance(item, types.ModuleType) and item.__name__.partition(".")[0] == name.partition(".")[0]:
                yield from _stores(vars(item), seen)
        yield from _stores(vars(sys.modules[name]), seen)


def _stores(names: Any, seen: set[int]) -> Iterator[Any]:
    for item in list(names.values()):
        if id(item) in seen:
            continue
        if isinstance(item, _CACHED) or (type(item) is dict and item is not names):
            seen.add(id(item))
            yield item
        elif isinstance(item, type) and item.__module__.partition(".")[0] not in (
            "torch",
            "builtins",
            "typing",
        ):
            seen.add(id(item))
            yield from _stores(vars(item), seen)
        elif callable(item) or isinstance(item, (staticmethod, classmethod)):
            seen.add(id(item))
            yield from _inside(item)


def _inside(function: Any) -> Iterator[Any]:
    """Caches that a decorated function wraps."""
    function = getattr(function, "__func__", function)
    closure = getattr(function, "__closure__", None)  # of the class of functions: a descriptor
    for cell in closure if isinstance(closure, tuple) else ():
        try:
            held = cell.cell_contents
        except ValueError:
            continue
        if isinstance(held, _CACHED) or type(held) is dict:
            yield held

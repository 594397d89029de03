"""Another `forward` put on a ported module: one that wraps the port's stays around it, any other is the model's."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from xdit_ir.reflection.names import names_in


def wraps(item: Any, ported: nn.Module, forward: Any, seen: set[int] | None = None) -> bool:
    """Whether a function can reach the port's own forward (the method `forward` of `ported`), as hooks that keep what
    was there before do: in its closure, arguments or attributes, or in an attribute of the module that it was given."""
    seen = set() if seen is None else seen
    if id(item) in seen:
        return False
    seen.add(id(item))
    if isinstance(item, functools.partial) and item.func is forward:
        return item.args[:1] == (ported,)
    return any(wraps(entry, ported, forward, seen) for entry in _held(item, ported))


def _held(item: Any, ported: nn.Module) -> Iterator[Any]:
    if item is ported:
        yield from (entry for name, entry in vars(ported).items() if not name.startswith("_xdit"))
    elif isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values(), *vars(item).values())
    elif isinstance(item, types.MethodType):
        yield from (item.__func__, item.__self__)
    elif isinstance(item, types.FunctionType):
        yield from (cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell))
        yield from (*(item.__defaults__ or ()), *vars(item).values())
        used = (item.__globals__.get(name) for name in names_in(item.__code__))
        yield from (entry for entry in used if isinstance(entry, (functools.partial, types.MethodType)))
    elif isinstance(item, (list, tuple)):
        yield from item
    elif isinstance(item, dict):
        yield from item.values()
    elif hasattr(item, "__dict__") and not isinstance(item, (nn.Module, types.ModuleType, type)):
        yield from vars(item).values()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def bound_to(item: Any, ported: nn.Module, original: nn.Module) -> Any:
    """A function that was bound to the port, bound to what it stands for."""
    if isinstance(item, types.MethodType) and item.__self__ is ported:
        return types.MethodType(item.__func__, original)
    if isinstance(item, functools.partial):
        args = (original if arg is ported else arg for arg in item.args)
        return functools.partial(bound_to(item.func, ported, original), *args, **item.keywords)
    return item

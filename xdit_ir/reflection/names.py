"""What code names: globals, attributes, texts, what it imports; and where packages come from."""

from __future__ import annotations

import dis
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

_INSTALLED = re.compile(r"[\\/](site|dist)-packages[\\/]")
_NAME = re.compile(r"[^\W\d]\w*")
_EVALUATES = frozenset({"eval", "exec"})
_IMPORT = dis.opmap["IMPORT_NAME"]


def names_in(code: types.CodeType) -> Iterator[str]:
    """All names of globals and attributes in some code, and in functions that it defines."""
    yield from code.co_names
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from names_in(item)


def words_in(code: types.CodeType) -> Iterator[str]:
    """Texts in some code that may be names, as in `getattr(self, "scale")`; of code that evaluates texts, those in
    texts too."""
    evaluates = not _EVALUATES.isdisjoint(code.co_names)
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from words_in(item)
        elif isinstance(item, str) and item.isidentifier():
            yield item
        elif isinstance(item, str) and evaluates:
            yield from _NAME.findall(item)


def imported_in(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """The Python modules that a function imports when it runs, as far as they have been imported."""
    package = function.__globals__.get("__package__") or ""
    for code in _codes(function.__code__):
        if _IMPORT not in code.co_code[::2]:
            continue
        before: list[Any] = [None, None]
        for step in dis.get_instructions(code):
            if step.opcode == dis.EXTENDED_ARG:
                continue
            if step.opcode == _IMPORT:
                yield from _imported(step.argval, before[0], before[1] or (), package)
            before = [before[1], step.argval]


def _imported(name: str, level: Any, members: tuple[str, ...], package: str) -> Iterator[types.ModuleType]:
    try:
        full = importlib.util.resolve_name("." * level + name, package) if level else name
    except ImportError:  # which the function gets itself, when it is run
        return
    found = (sys.modules.get(one) for one in (full, *(f"{full}.{member}" for member in members)))
    yield from (module for module in found if isinstance(module, types.ModuleType))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _codes(item)


def package_of(item: Any) -> str:
    """The package that something comes from, or its class."""
    if isinstance(item, types.ModuleType):
        return item.__name__.partition(".")[0]
    kind = item if isinstance(item, (type, types.FunctionType)) else type(item)
    return str(kind.__module__).partition(".")[0]


def is_installed(package: str) -> bool:
    """Whether a package, or this one, is a library of somebody's and not code that lies beside the model."""
    if package == __name__.partition(".")[0] or package not in sys.modules:
        return True
    module = sys.modules[package]
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(isinstance(place, str) and _INSTALLED.search(f"{place}/") for place in places)


def is_operator(name: str) -> bool:
    """Whether a class says by this name what Python does with its objects."""
    return name.startswith("__") and name.endswith("__") and name not in ("__doc__", "__dict__", "__weakref__")

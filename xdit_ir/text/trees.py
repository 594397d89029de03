"""PyTorch's own text of a tree of containers, of which only what names no code is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch.utils import _pytree as pytree

from xdit_ir.errors import ParseError

_FACTORIES = frozenset({"list", "dict", "set", "tuple", "int", "float", "bool", "str"})


def load_tree(text: str) -> pytree.TreeSpec:
    """The tree that `pytree.treespec_dumps` wrote.

    Raises:
        ParseError: it is none, or names something to import: pytree would, for members of enums and for what makes the
            missing entries of a defaultdict.
    """
    try:
        for entry in _dicts(json.loads(text)):
            if "__enum__" in entry:
                raise ParseError("a tree of arguments has members of enums as keys, which are not read from a text")
            if "default_factory_name" in entry and not _is_plain_factory(entry):
                raise ParseError(f"a defaultdict of {entry['default_factory_name']!r} is not read from a text")
        return pytree.treespec_loads(text)
    except (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        raise ParseError(f"{text[:80]!r} is no tree of arguments: {type(error).__name__}: {error}") from error


def _is_plain_factory(entry: dict[str, Any]) -> bool:
    name = entry["default_factory_name"]
    return entry.get("default_factory_module") == "builtins" and isinstance(name, str) and name in _FACTORIES


def _dicts(item: Any) -> Iterator[dict[str, Any]]:
    """All dicts in what JSON gave, also in strings that are JSON themselves, as contexts are."""
    if isinstance(item, str):
        try:
            inner = json.loads(item)
        except ValueError:
            return
        if isinstance(inner, (str, list, dict)):
            yield from _dicts(inner)
    elif isinstance(item, list):
        for entry in item:
            yield from _dicts(entry)
    elif isinstance(item, dict):
        yield item
        for entry in item.values():
            yield from _dicts(entry)

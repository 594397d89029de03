"""Frozen dataclasses from plain values, as files of JSON and TOML hold them: each name and type is checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from xdit_ir.errors import ParallelizeError

Kind = TypeVar("Kind")
# How what is no plain value is made of one; raises `ParallelizeError`.
Readers = Mapping[Any, Callable[[Any], Any]]
SAYS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def read(kind: type[Kind], data: object, where: str = "", readers: Readers = types.MappingProxyType({})) -> Kind:
    """The dataclass `kind` whose fields are in `data`, by their annotations; fields with a default may be left out.

    Raises:
        ValueError: a name is unknown or missing, or a value is none of its type; says which, `where`, and what is
            expected.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or 'all of it'}: expected names with values, got {data!r:.60}")
    known = {one.name: one for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{_at(where, name)} is not known; {hint}there are {', '.join(known)}")
    for name, one in known.items():
        if name not in data and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_at(where, name)} is missing")
    hints = typing.get_type_hints(kind)
    values = {name: _value(hints[name], value, _at(where, name), readers) for name, value in data.items()}
    try:
        return kind(**values)
    except (ValueError, ParallelizeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _at(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _value(hint: Any, value: Any, where: str, readers: Readers) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in readers:
        try:
            return readers[hint](value)
        except ParallelizeError as error:
            raise ValueError(f"{where}: {error}") from None
    if origin in (types.UnionType, typing.Union):
        if any(_fits(one, value) for one in inner):
            return value
        if made := [one for one in inner if one not in SAYS]:
            return _value(made[0], value, where, readers)
    elif origin is tuple and isinstance(value, list):
        return tuple(_value(inner[0], one, f"{where}[{place}]", readers) for place, one in enumerate(value))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(name): _value(inner[1], one, f"{where}.{name}", readers) for name, one in value.items()}
    elif dataclasses.is_dataclass(hint):
        return read(typing.cast(type[Any], hint), value, where, readers)
    elif _fits(hint, value):
        return value
    raise ValueError(f"{where} = {value!r:.60}: expected {_said(hint)}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is a plain one of this type; numbers are finite, and truth values are none."""
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return hint in SAYS and isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _said(hint: Any) -> str:
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_said(inner[0])}"
    return SAYS.get(hint) or " or ".join(SAYS.get(one, "names with values") for one in inner) or "names with values"

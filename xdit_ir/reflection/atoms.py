"""Objects that are nothing but their value, or their attributes, and whether entries are as they were."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import numpy as np
import torch

ATOMS = (
    str,
    bytes,
    int,
    float,
    bool,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    range,
    slice,
    np.generic,
)
VALUES = frozenset({bool, int, float, str, type(None)})  # classes of what is nothing but its value
_HEAP_TYPE = 1 << 9


def is_atom(item: Any) -> bool:
    """Whether an object is nothing but its value: a number or text, which can have no attributes of its own."""
    return isinstance(item, ATOMS) and not hasattr(item, "__dict__")


def is_plain_object(kind: type) -> bool:
    """Whether instances are nothing but their `__dict__`: Python classes all the way, without slots."""
    constructor: Any = kind.__new__
    if constructor is not object.__new__ or issubclass(kind, BaseException):
        return False
    return all(base is object or _is_plain_class(base) for base in kind.__mro__)


def _is_plain_class(base: type) -> bool:
    return bool(base.__flags__ & _HEAP_TYPE) and not base.__dict__.get("__slots__")  # an interface's may be empty


def alike(now: Any, before: Any) -> bool:
    """Whether an entry is as it was: the same object, or an equal number, text or the like."""
    if now is before:
        return True
    if type(now) is not type(before) or not is_atom(now):
        return False
    if now == before:
        return bool(now) or str(now) == str(before)  # of zeros the sign too
    return bool(now != now and before != before)


def same_entries(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Whether all entries are as they were, in the same order."""
    if len(now) != len(before):
        return False
    return (all(map(is_, now, before)) or all(map(_is_same_key, now, before))) and (
        all(map(is_, now.values(), before.values())) or all(map(alike, now.values(), before.values()))
    )


def _is_same_key(now: Any, before: Any) -> bool:
    return now is before or (not isinstance(now, torch.Tensor) and bool(now == before))

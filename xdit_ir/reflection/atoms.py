"""Objects that are nothing but their value, and whether entries are as they were."""

from __future__ import annotations

from collections.abc import Mapping
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


def is_atom(item: Any) -> bool:
    """Whether an object is nothing but its value: a number or text, which can have no attributes of its own."""
    return isinstance(item, ATOMS) and not hasattr(item, "__dict__")


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
    return (
        len(now) == len(before)
        and all(map(_is_same_key, now, before))
        and all(map(alike, now.values(), before.values()))
    )


def _is_same_key(now: Any, before: Any) -> bool:
    return now is before or (not isinstance(now, torch.Tensor) and bool(now == before))

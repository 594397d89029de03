"""Which operators draw random numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_DROPOUTS = (("dropout_p",), ("p", "train"), ("dropout", "train"))


@cache
def dropout_arguments(func: Any) -> tuple[str, ...]:
    """The arguments of an overload that, if set, make it drop elements at random."""
    names = {argument.name for argument in func._schema.arguments}
    return next((one for one in _DROPOUTS if names.issuperset(one)), ())


def is_random(target: Any) -> bool:
    """Whether what a node calls draws random numbers; dropout, which is not active, does not."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and not dropout_arguments(target)

"""Which operators draw random numbers, and which give the same whenever they are called."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch

from xdit_ir.ir import ops

_SELECTIONS = (ops.take, ops.take_each, ops.put, operator.getitem)
_DROPOUTS = (("dropout_p",), ("p", "train"), ("dropout", "train"))


@cache
def dropout_arguments(func: Any) -> tuple[str, ...]:
    """The arguments of an overload that, if set, make it drop elements at random."""
    names = {argument.name for argument in func._schema.arguments}
    return next((one for one in _DROPOUTS if names.issuperset(one)), ())


def is_random(target: Any) -> bool:
    """Whether what a node calls draws random numbers; dropout, which is not active, does not."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and not dropout_arguments(target)


def is_pure(target: Any) -> bool:
    """Whether what a node calls makes the same of the same operands whenever it is called, and changes none: one of
    ATen's, or a selection."""
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and not is_random(target)
    return target in _SELECTIONS

"""Of which samples of a pending result a value was made, position by position of the dimension that counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xdit_ir.deferral.separable import Needs, dim_argument

aten = torch.ops.aten
Places = tuple[frozenset[int], ...]
Shape = Sequence[int]
NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Samples:
    """`places[p]`: the samples that position p of dimension `dim` was made of. Without a `dim`, all of the value was
    made of `places[0]`."""

    places: Places
    dim: int | None = 0

    @staticmethod
    def of(count: int) -> Samples:
        """Those of the result itself."""
        return Samples(tuple(frozenset([place]) for place in range(count)))

    @property
    def everything(self) -> frozenset[int]:
        """All of them."""
        return NOTHING.union(*self.places)

    @property
    def in_place(self) -> bool:
        """Whether every position was made of the sample that had it, maybe among others: a batch is doubled for
        guidance, and halved again."""
        return self.dim == 0 and all(place in samples for place, samples in enumerate(self.places))


Found = Sequence[Samples | None]


@dataclass(frozen=True)
class Step:
    """An operator: its arguments, which of its results (`index`), the shapes of its operands and of the result, and for
    each dimension of that the ranges of operands that all of it needs."""

    func: Any
    args: Sequence[Any]
    index: int | None
    shapes: Sequence[Shape]
    out: Shape
    needs: Sequence[Needs | None]


def carried(step: Step, found: Found) -> Samples | None:
    """Those of an operator's result, by those of its operands (None: made of no result); None if unknown."""
    moved = _moved(step, found)
    return _united(step, found) if moved is None else moved


def _united(step: Step, found: Found) -> Samples | None:
    """Of an operator that leaves positions where they are, in the same or in another dimension."""
    known = [one for one in found if one is not None]
    divided = {at: one for at, one in enumerate(found) if one is not None and one.dim is not None}
    if not divided:
        return Samples((NOTHING.union(*(one.everything for one in known)),), None)
    dim = _united_dim(step, divided)
    if dim is None:
        return None
    need = step.needs[dim] or [None] * len(found)
    places = [NOTHING] * step.out[dim]
    for at, one in enumerate(found):
        if one is None:
            continue
        if len(one.places) == 1:
            places = [a | one.everything for a in places]
        elif _follows(need[at], one) and len(one.places) == len(places):
            places = [a | b for a, b in zip(places, one.places, strict=True)]
        else:
            return None
    return Samples(tuple(places), dim)


def _united_dim(step: Step, divided: Mapping[int, Samples]) -> int | None:
    """The dimension of the result that counts samples."""
    dims = {
        dim
        for dim, need in enumerate(step.needs)
        if need and any(_follows(need[at], one) for at, one in divided.items())
    }
    if not dims and step.func is torch.einsum:  # one sample, whose label may be any
        dims = {one.dim for one in divided.values() if one.dim is not None}
    elif not dims:  # one sample each, to which others may be broadcast: dimensions are aligned at the last
        dims = {one.dim + len(step.out) - len(step.shapes[at]) for at, one in divided.items() if one.dim is not None}
    [dim] = dims if len(dims) == 1 else [-1]
    return dim if 0 <= dim < len(step.out) else None


def _follows(need: Any, one: Samples) -> bool:
    return need is not None and need.dim == one.dim


def _moved(step: Step, found: Found) -> Samples | None:
    """Of an operator that moves positions along the dimension; None for any other."""
    rank = len(step.out)
    dims = {one.dim for one in found if one is not None}
    [dim] = dims if len(dims) == 1 else [None]
    if step.func is aten.stack.default and dims == {None}:
        places = tuple(NOTHING if one is None else one.everything for one in found)
        return Samples(places, dim_argument(step.args, 1, rank))
    if dim is None:
        return None
    if step.func is aten.cat.default and dim_argument(step.args, 1, rank) == dim:
        pairs = zip(found, step.shapes, strict=True)
        pieces = ((NOTHING,) * shape[dim] if one is None else one.places for one, shape in pairs)
        return Samples(tuple(place for piece in pieces for place in piece), dim)
    first = found[0] if found else None
    if step.func not in _ALONG or first is None:
        return None
    if dim_argument(step.args, _ALONG[step.func], len(step.shapes[0])) != dim:
        return None
    return _cut(step.func, step.args, step.index or 0, first.places, dim)


# Operators of one operand, and which argument names the dimension.
_ALONG = {
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.unbind.int: 1,
    aten.squeeze.dim: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}


def _cut(func: Any, args: Sequence[Any], index: int, places: Places, dim: int) -> Samples:
    if func is aten.slice.Tensor:
        start, stop, step = (args[at] if len(args) > at else None for at in (2, 3, 4))
        return Samples(places[slice(start, stop, step)], dim)
    if func is aten.squeeze.dim:
        return Samples(places, None if len(places) == 1 else dim)
    if func in (aten.select.int, aten.unbind.int):
        return Samples((places[args[2] if func is aten.select.int else index],), None)
    sizes = [args[1]] * (index + 1) if func is aten.split.Tensor else args[1]
    start = sum(sizes[:index])
    return Samples(places[start : start + sizes[index]], dim)

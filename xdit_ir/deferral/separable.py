"""Which part of its operands an operator needs for a range of one dimension of its result."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten
Shape = Sequence[int]


@dataclass(frozen=True)
class Range:
    """Positions `start` to `stop` of dimension `dim`."""

    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.stop - self.start

    def at(self, dim: int) -> Range:
        """The same positions of another dimension."""
        return Range(dim, self.start, self.stop)


Needs = list[Range | None]
"""Per operand: a range, or None for all of it."""


def operand_ranges(func: Any, args: Sequence[Any], shapes: Sequence[Shape], out: Shape, wanted: Range) -> Needs | None:
    """What is needed of the tensor operands (of these shapes, in order); None if more than a range is.

    Args:
        func: a pointwise operator, or one of `STRUCTURAL`.
        args: its arguments; tensors may be anything.
        out: the shape of the result of which `wanted` is wanted.
    """
    if func in (torch.einsum,):
        return _einsum(args, shapes, out, wanted)
    if torch.Tag.pointwise in getattr(func, "tags", ()) or func is aten.expand.default:
        return [_broadcast(shape, out, wanted) for shape in shapes]
    rule = _RULES.get(func)
    dim = None if rule is None else rule(args, shapes, out, wanted.dim)
    return None if dim is None else [wanted.at(dim) for _ in shapes]


@dataclass(frozen=True)
class MovedRows:
    """Positions of an operand, from `start` on, that are those of the result from `place` on."""

    start: int
    place: int
    size: int

    def of(self, wanted: Range) -> Range:
        """Those that are wanted; none if none of them are."""
        low, high = max(wanted.start, self.place), min(wanted.stop, self.place + self.size)
        start = self.start + low - self.place
        return Range(wanted.dim, start, start + high - low) if low < high else Range(wanted.dim, 0, 0)


def pieces(
    func: Any, args: Sequence[Any], index: int | None, shapes: Sequence[Shape], out: Shape, dim: int
) -> list[MovedRows] | None:
    """What each operand gives of a dimension along which an operator cuts or joins; None for any other."""
    place = _ALONG.get(func)
    if place is None or dim_argument(args, place, len(out)) != dim or any(len(one) != len(out) for one in shapes):
        return None
    if func is aten.cat.default:
        ends = list(itertools.accumulate((shape[dim] for shape in shapes), initial=0))
        return [MovedRows(0, end, shape[dim]) for end, shape in zip(ends, shapes, strict=False)]
    if func is aten.slice.Tensor:
        start, _, step = (args[at] if len(args) > at else None for at in (2, 3, 4))
        first = range(shapes[0][dim])[start:].start
        return [MovedRows(first, 0, out[dim])] if step in (None, 1) else None
    sizes = [args[1]] * (index or 0) if func is aten.split.Tensor else args[1][: index or 0]
    return [MovedRows(sum(sizes), 0, out[dim])]


def _broadcast(shape: Shape, out: Shape, wanted: Range) -> Range | None:
    dim = wanted.dim - (len(out) - len(shape))
    return wanted.at(dim) if dim >= 0 and shape[dim] == out[wanted.dim] and shape[dim] != 1 else None


def _einsum(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, wanted: Range) -> Needs | None:
    """By labels; an ellipsis stands for the dims that no label names."""
    terms, arrow, result = str(args[0]).replace(" ", "").partition("->")
    if not arrow:
        return None
    labels = _labels(result, len(out))
    needs: Needs = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        own = _labels(term, len(shape))
        label = labels[wanted.dim]
        needs.append(wanted.at(own.index(label)) if label in own and shape[own.index(label)] > 1 else None)
    return needs if any(need is not None for need in needs) else None


def _labels(term: str, count: int) -> list[str]:
    """One label per dim; the dims of an ellipsis are numbered from the last."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(before)
    hidden = count - len(before) - len(after)
    return [*before, *(f".{hidden - 1 - place}" for place in range(hidden)), *after]


Rule = Callable[[Sequence[Any], Sequence[Shape], Shape, int], int | None]


def _same(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    return dim


def _view(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    """The dimension of the operand that is this one: of the same size, behind as many elements."""
    behind = math.prod(out[:dim])
    found = (d for d, size in enumerate(shapes[0]) if size == out[dim] and math.prod(shapes[0][:d]) == behind)
    return next(found, None)


def _permute(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    return int(args[1][dim]) % len(out)


def _transpose(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    a, b = (int(d) % len(out) for d in args[1:3])
    return {a: b, b: a}.get(dim, dim)


def dim_argument(args: Sequence[Any], place: int, count: int) -> int:
    """The argument at a place that names one of so many dimensions, or the first of them."""
    return int(args[place]) % count if len(args) > place else 0


def _unsqueeze(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    """unsqueeze, stack: one dimension of the result is new."""
    new = dim_argument(args, 1, len(out))
    return None if dim == new else dim - (dim > new)


def _squeeze(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    gone = dim_argument(args, 1, len(shapes[0]))
    return dim if len(out) == len(shapes[0]) else dim + (dim >= gone)


def _removed(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
    """select, unbind: one dimension of the operand is gone."""
    return dim + (dim >= dim_argument(args, 1, len(shapes[0])))


def _elsewhere(place: int) -> Rule:
    """slice, split, cat: positions of the dimension that argument `place` names move (see `pieces`), others stay."""

    def rule(args: Sequence[Any], shapes: Sequence[Shape], out: Shape, dim: int) -> int | None:
        return dim if dim != dim_argument(args, place, len(out)) else None

    return rule


# Which argument names the dimension.
_ALONG = {
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.cat.default: 1,
}
_RULES: dict[Any, Rule] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten._to_copy.default: _same,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.select.int: _removed,
    aten.unbind.int: _removed,
    aten.stack.default: _unsqueeze,
    **{func: _elsewhere(place) for func, place in _ALONG.items()},
}
STRUCTURAL = frozenset({*_RULES, aten.expand.default})


def is_recordable(func: Any) -> bool:
    """Whether an operator's result has parts that follow from parts of its operands."""
    return torch.Tag.pointwise in func.tags or func in STRUCTURAL


def resized(func: Any, args: tuple[Any, ...], out: Shape, wanted: Range) -> tuple[Any, ...]:
    """Arguments for a part: those that name the shape of the result, or cover a dimension, are adapted."""
    if func in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        sizes = list(out)
        sizes[wanted.dim] = wanted.size
        return (args[0], sizes, *args[2:])
    return args


def tensors_in(args: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The leaves of these kinds, in order."""
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, kinds)]

"""An exchange as rectangular memory copies, straight from where values lie to where their receivers want them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xdit_ir.ir.partition import Runs
from xdit_ir.ir.relayout import RankExchange


@dataclass(frozen=True)
class Copy:
    """`height` rows of `width` bytes; offsets and the distances between rows (pitches) in bytes."""

    source: int
    source_pitch: int
    target: int
    target_pitch: int
    width: int
    height: int

    @property
    def row(self) -> tuple[int, ...]:
        """All of it."""
        return self.source, self.source_pitch, self.target, self.target_pitch, self.width, self.height


@dataclass(frozen=True)
class _Dim:
    size: int
    source: int
    target: int


def copies(exchange: RankExchange, member: int, itemsize: int) -> tuple[Copy, ...]:
    """How this rank's piece for `group[member]` gets from its dense local value into that rank's dense result."""
    landing = exchange.landings[member]
    if not math.prod(exchange.sends[member].shape):
        return ()
    held, shape = exchange.held, landing.shape
    places = [
        list(_sections(take, place, size))
        for take, place, size in zip(exchange.sends[member].take, landing.places, held, strict=True)
    ]
    source_strides, target_strides = _strides(held), _strides(shape)
    found: list[Copy] = []
    for box in itertools.product(*places):
        source = sum(start * stride for (start, _, _), stride in zip(box, source_strides, strict=True))
        target = sum(start * stride for (_, start, _), stride in zip(box, target_strides, strict=True))
        sizes = [length for _, _, length in box]
        dims = _merged([_Dim(*dim) for dim in zip(sizes, source_strides, target_strides, strict=True)])
        found += _rectangles(dims, source, target, itemsize)
    return tuple(found)


def _sections(take: Runs | None, place: Runs | None, size: int) -> Iterator[tuple[int, int, int]]:
    """(source, target, length) of stretches that are consecutive on both sides."""
    count = sum(length for _, length in take) if take is not None else size
    left, right = list(take or ((0, count),)), list(place or ((0, count),))
    while left:
        (source, first), (target, second) = left.pop(0), right.pop(0)
        length = min(first, second)
        if length:
            yield source, target, length
        if first > length:
            left.insert(0, (source + length, first - length))
        if second > length:
            right.insert(0, (target + length, second - length))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _merged(dims: Sequence[_Dim]) -> list[_Dim]:
    """Dimensions that are dense in each other on both sides become one; those of length one go."""
    result: list[_Dim] = []
    for dim in (dim for dim in dims if dim.size > 1):
        outer = result[-1] if result else None
        if outer and (outer.source, outer.target) == (dim.size * dim.source, dim.size * dim.target):
            result[-1] = _Dim(outer.size * dim.size, dim.source, dim.target)
        else:
            result.append(dim)
    return result


def _rectangles(dims: list[_Dim], source: int, target: int, itemsize: int) -> Iterator[Copy]:
    row = dims.pop() if dims and (dims[-1].source, dims[-1].target) == (1, 1) else _Dim(1, 1, 1)
    column = dims.pop() if dims else _Dim(1, row.size, row.size)
    for place in itertools.product(*(range(dim.size) for dim in dims)):
        here = source + sum(i * dim.source for i, dim in zip(place, dims, strict=True))
        there = target + sum(i * dim.target for i, dim in zip(place, dims, strict=True))
        yield Copy(
            here * itemsize,
            column.source * itemsize,
            there * itemsize,
            column.target * itemsize,
            row.size * itemsize,
            column.size,
        )

"""Exact index sets: which global indices of one tensor dimension every rank holds, in its local order.

Everything is static integer arithmetic on immutable values, so views, slices, concatenations, permutations, uneven
shards and halos are all exact and need no symbolic algebra.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Runs = tuple[tuple[int, int], ...]
# From so many runs on, arrays are quicker than loops.
MANY = 64


@dataclass(frozen=True)
class Indices:
    """An ordered sequence of distinct indices, stored as maximal runs `(start, length)` of consecutive ones."""

    runs: Runs

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.runs)

    @staticmethod
    def of_runs(runs: Iterable[tuple[int, int]]) -> Indices:
        """Normalise: drop empty runs, join adjacent ones."""
        joined: list[tuple[int, int]] = []
        for start, length in runs:
            if length <= 0:
                continue
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        return Indices(tuple(joined))

    @staticmethod
    def range(start: int, stop: int) -> Indices:
        """`start, start + 1, ..., stop - 1`."""
        return Indices.of_runs([(start, stop - start)])

    @staticmethod
    def of_array(array: IntArray) -> Indices:
        """From explicit indices, in order."""
        if array.size == 0:
            return Indices(())
        breaks = np.flatnonzero(np.diff(array) != 1) + 1
        starts = np.concatenate([[0], breaks])
        lengths = np.diff(np.concatenate([starts, [array.size]]))
        return Indices(tuple(zip(array[starts].tolist(), lengths.tolist(), strict=True)))

    @cached_property
    def array(self) -> IntArray:
        """The indices, explicit, in order."""
        if not self.runs:
            return np.empty(0, dtype=np.int64)
        if len(self.runs) == 1:
            return np.arange(self.runs[0][0], sum(self.runs[0]))
        starts, lengths = np.array(self.runs, dtype=np.int64).T
        before = np.cumsum(lengths) - lengths
        return np.repeat(starts - before, lengths) + np.arange(self.size)

    @cached_property
    def _sorted(self) -> tuple[IntArray, IntArray]:
        """Local positions in the order of their indices, and the indices in that order."""
        order = np.argsort(self.array, kind="stable").astype(np.int64)
        return order, self.array[order]

    @cached_property
    def size(self) -> int:
        """How many indices."""
        return sum(length for _, length in self.runs)

    def is_whole(self, size: int) -> bool:
        """Whether these are all of `0..size-1` in natural order."""
        return self.runs == (((0, size),) if size else ())

    def shift(self, by: int) -> Indices:
        """Every index plus `by`."""
        return Indices(tuple((start + by, length) for start, length in self.runs))

    def at(self, positions: Indices) -> Indices:
        """The indices at these local positions, in the order of the positions."""
        return Indices.of_array(self.array[positions.array])

    def concat(self, other: Indices) -> Indices:
        """These, then the others."""
        if not self.runs or not other.runs:
            return self if self.runs else other
        (start, length), (begin, more) = self.runs[-1], other.runs[0]
        if start + length != begin:
            return Indices(self.runs + other.runs)
        return Indices((*self.runs[:-1], (start, length + more), *other.runs[1:]))

    def outer(self, inner: Indices, inner_size: int) -> Indices:
        """Row-major flat indices of the product set `self x inner` where the inner dimension has `inner_size`."""
        if inner.is_whole(inner_size):
            return Indices.of_runs((start * inner_size, length * inner_size) for start, length in self.runs)
        return Indices.of_array((self.array[:, None] * inner_size + inner.array[None, :]).reshape(-1))

    def factor(self, inner_size: int) -> tuple[Indices, Indices] | None:
        """The `(outer, inner)` whose row-major product set is this, or None where it is no such product."""
        if all(start % inner_size == 0 and length % inner_size == 0 for start, length in self.runs):
            outer = Indices.of_runs((start // inner_size, length // inner_size) for start, length in self.runs)
            return outer, Indices.range(0, inner_size)
        rows, columns = np.divmod(self.array, inner_size)
        width = int(np.flatnonzero(np.append(rows[1:] != rows[0], True))[0]) + 1
        if self.size % width:
            return None
        outer_array, inner_array = rows[::width], columns[:width]
        product = (outer_array[:, None] * inner_size + inner_array[None, :]).reshape(-1)
        if len(set(outer_array.tolist())) != outer_array.size or not np.array_equal(product, self.array):
            return None
        return Indices.of_array(outer_array), Indices.of_array(inner_array)

    def select(self, start: int, stop: int, step: int = 1) -> tuple[Indices, Indices]:
        """What a slice `start:stop:step` of the dimension keeps of these: new global indices, and local positions."""
        keep = (self.array >= start) & (self.array < stop) & ((self.array - start) % step == 0)
        return Indices.of_array((self.array[keep] - start) // step), Indices.of_array(np.flatnonzero(keep))

    def positions(self, wanted: Indices) -> Indices:
        """Local positions at which the `wanted` indices (all held here) lie, in the order of `wanted`."""
        if len(self.runs) == 1:
            start = self.runs[0][0]
            return wanted.shift(-start)
        order, ordered = self._sorted
        return Indices.of_array(order[np.searchsorted(ordered, wanted.array)])

    def within(self, other: Indices) -> Indices:
        """Those of these that `other` holds too, in the order of these."""
        if len(self.runs) + len(other.runs) > MANY:
            _, starts, lengths = self._overlaps(other)
            return Indices._joined(starts, lengths)
        return Indices.of_runs((start, length) for _, start, length in self._shared(other))

    def places_in(self, other: Indices) -> Indices:
        """Local positions, ascending, of those of these that `other` holds too."""
        if len(self.runs) + len(other.runs) > MANY:
            places, _, lengths = self._overlaps(other)
            return Indices._joined(places, lengths)
        return Indices.of_runs((place, length) for place, _, length in self._shared(other))

    @cached_property
    def _ascending(self) -> tuple[list[int], Runs]:
        """The runs in natural order, and where they start."""
        runs = tuple(sorted(self.runs))
        return [start for start, _ in runs], runs

    @cached_property
    def _columns(self) -> tuple[IntArray, IntArray]:
        return _columns(self.runs)

    @cached_property
    def _ascending_columns(self) -> tuple[IntArray, IntArray]:
        return _columns(self._ascending[1])

    @cached_property
    def _others(self) -> Indices:
        """All indices that these are not."""
        starts, runs = self._ascending
        begins = [0, *(start + length for start, length in runs)]
        return Indices.of_runs((begin, end - begin) for begin, end in zip(begins, [*starts, sys.maxsize], strict=True))

    def _shared(self, other: Indices) -> Iterator[tuple[int, int, int]]:
        """Stretches that both hold, in the order of these: local position, start, length."""
        place, (starts, runs) = 0, other._ascending
        for start, length in self.runs:
            for at in range(max(bisect.bisect_right(starts, start) - 1, 0), len(runs)):
                first, last = max(start, runs[at][0]), min(start + length, sum(runs[at]))
                if starts[at] >= start + length:
                    break
                if first < last:
                    yield place + first - start, first, last - first
            place += length

    def _overlaps(self, other: Indices) -> tuple[IntArray, IntArray, IntArray]:
        """The same of many runs, as columns."""
        (begins, sizes), (starts, lengths) = self._columns, other._ascending_columns
        low = np.maximum(np.searchsorted(starts, begins, "right") - 1, 0)
        counts = np.maximum(np.searchsorted(starts, begins + sizes, "left") - low, 0)
        run = np.repeat(np.arange(len(begins)), counts)
        at = np.arange(len(run)) + np.repeat(low - np.cumsum(counts) + counts, counts)
        first = np.maximum(begins[run], starts[at])
        last = np.minimum((begins + sizes)[run], (starts + lengths)[at])
        kept = first < last
        places = (np.cumsum(sizes) - sizes - begins)[run] + first
        return places[kept], first[kept], (last - first)[kept]

    @staticmethod
    def _joined(starts: IntArray, lengths: IntArray) -> Indices:
        """Of runs that are not empty."""
        if not len(starts):
            return Indices(())
        heads = np.flatnonzero(np.concatenate([[True], starts[1:] != (starts + lengths)[:-1]]))
        return Indices(tuple(zip(starts[heads].tolist(), np.add.reduceat(lengths, heads).tolist(), strict=True)))

    def merged(self, others: Indices) -> Indices:
        """These and others: in natural order if these are, else the others behind."""
        both = self.concat(others)
        ascending = bool((np.diff(self.array) > 0).all())
        return Indices.of_array(np.sort(both.array)) if ascending else both

    def without(self, other: Indices) -> Indices:
        """Those of these that `other` does not hold, in the order of these."""
        return self.within(other._others)

    def map(self, function: Callable[[IntArray], IntArray]) -> Indices:
        """Apply an injective function to every index, keeping the order."""
        return Indices.of_array(function(self.array))


def _columns(runs: Runs) -> tuple[IntArray, IntArray]:
    """Starts and lengths."""
    table = np.array(runs, dtype=np.int64).reshape(-1, 2)
    return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])


@dataclass(frozen=True)
class Partition:
    """For every rank the part of one dimension (of global length `size`) that it holds. Parts may be empty."""

    size: int
    parts: tuple[Indices, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.size, self.parts))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Partition) and self.size == other.size and self.parts == other.parts

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Local length on every rank."""
        return tuple(part.size for part in self.parts)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every rank holds everything in natural order."""
        return all(part.is_whole(self.size) for part in self.parts)

    def map(self, size: int, function: Callable[[Indices], Indices]) -> Partition:
        """Apply `function` to every distinct part."""
        return _map_parts(size, self.parts, function)

    def longer(self, factor: int) -> Partition:
        """That of a dimension in which every index has become `factor` neighbours."""
        every = Indices.range(0, factor)
        return self.map(self.size * factor, lambda part: part.outer(every, factor))

    def shorter(self, factor: int) -> Partition | None:
        """The inverse of `longer`; None where some rank has only a part of such neighbours."""
        pairs = {part: part.factor(factor) for part in set(self.parts)}
        if any(pair is None or not pair[1].is_whole(factor) for pair in pairs.values()):
            return None
        outer = tuple(pair[0] for part in self.parts if (pair := pairs[part]) is not None)
        return Partition(self.size // factor, outer)

    def covers(self, ranks: Iterable[int]) -> bool:
        """Whether these ranks together hold every index."""
        end = 0
        for start, length in self._runs(ranks):
            if start > end:
                return False
            end = max(end, start + length)
        return end == self.size

    def tiles(self, ranks: tuple[int, ...]) -> bool:
        """Whether exactly one of these ranks holds each index."""
        return _tiles(self, ranks)

    def _runs(self, ranks: Iterable[int]) -> list[tuple[int, int]]:
        return sorted(itertools.chain.from_iterable(self.parts[rank].runs for rank in ranks))


def _map_parts(size: int, parts: tuple[Indices, ...], function: Callable[[Indices], Indices]) -> Partition:
    done = {part: function(part) for part in set(parts)}
    return Partition(size, tuple(done[part] for part in parts))


@lru_cache(maxsize=4096)
def _tiles(partition: Partition, ranks: tuple[int, ...]) -> bool:
    end = 0
    for start, length in partition._runs(ranks):
        if start != end:
            return False
        end = start + length
    return end == partition.size


@lru_cache(maxsize=4096)
def even_cuts(size: int, count: int) -> tuple[int, ...]:
    """`count + 1` cut points dividing `0..size` as evenly as integers allow, the longer pieces first."""
    base, extra = divmod(size, count)
    return tuple(piece * base + min(piece, extra) for piece in range(count + 1))


def even_pieces(size: int, count: int, unit: int = 1, segments: Sequence[int] = ()) -> list[Indices]:
    """`count` pieces of a dimension, even within every segment, in whole units.

    `segments` are the lengths of consecutive segments (default: one); `unit` applies to those that it divides.
    """
    if segments and sum(segments) != size:
        raise ValueError(f"segments {tuple(segments)} do not add up to {size}")
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    offset = 0
    for length in segments or (size,):
        step = unit if length % unit == 0 else 1
        for piece, (start, stop) in zip(pieces, itertools.pairwise(even_cuts(length // step, count)), strict=True):
            piece.append((offset + start * step, (stop - start) * step))
        offset += length
    return [Indices.of_runs(piece) for piece in pieces]


def selected(partition: Partition | None, places: Indices) -> Partition | None:
    """The partition of the values at these places of a dimension, in this order, where every rank keeps its own."""
    return None if partition is None else partition.map(places.size, places.places_in)


def spread(mesh_divide: Callable[[int], Partition], kept: Partition, places: Indices, size: int) -> Partition:
    """A partition of a dimension whose values at these places are divided like `kept`, the others evenly."""
    rest = Indices.range(0, size).without(places)
    shares = mesh_divide(rest.size).parts
    parts = (places.at(own).merged(rest.at(share)) for own, share in zip(kept.parts, shares, strict=True))
    return Partition(size, tuple(parts))

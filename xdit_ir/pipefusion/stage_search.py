"""Where to cut a run of operators into the stages of a pipeline: one run a rank, or (folded) two, there and back again.

Both searches are exact: the least work of the slowest rank such that no rank has more weights than a bound, and among
cuts that are nearly as good, those over which the fewest bytes go.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdit_ir.ir.partition import IntArray

# Among cuts that are this close to the best balance, the one with the fewest bytes is taken.
SLACK = 1.001
# How far above the mean the slowest rank of a fold may be, tried in this order: the search is quick where it is low.
EXCESS = (0.01, 0.03, 0.1, 0.3, 1.0, np.inf)

Floats = NDArray[np.float64]
State = tuple[int, int]


def contiguous(ranks: int) -> tuple[int, ...]:
    """Coordinates of stages, one stage for each coordinate."""
    return tuple(range(ranks))


def folded(ranks: int) -> tuple[int, ...]:
    """Coordinates of twice as many stages as there are coordinates: there and back again."""
    return (*range(ranks), *reversed(range(ranks)))


@dataclass(frozen=True, eq=False)
class CutPoints:
    """Where one may cut: the begin, places in between, and the end.

    `work` (ticks of a machine) and `weights` (bytes) are the sums before each. `sent[i, j]`: bytes that go over the
    marks i and j if what lies before i and what lies from j on are on the same ranks; with j the end: all that goes
    over i.
    """

    work: IntArray
    weights: IntArray
    sent: IntArray

    @property
    def end(self) -> int:
        """The last mark."""
        return len(self.work) - 1


@dataclass(frozen=True)
class StagePlan:
    """Coordinates of the stages, the inner marks at which they begin, work of the slowest rank, and bytes that go over
    the busiest boundary between ranks."""

    coordinates: tuple[int, ...]
    marks: tuple[int, ...]
    slowest: int
    bytes: int


def cut_straight(marks: CutPoints, count: int, weights: float) -> StagePlan | None:
    """Cuts into `count` runs with at most so many bytes of weights each; None if there are none."""
    if marks.end < count:
        return None
    low, high = int(marks.work[-1]) // count, int(marks.work[-1])
    if not _reaches(marks, count, high, weights):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _reaches(marks, count, middle, weights) else (middle + 1, high)
    found = _cheapest(marks, count, low * SLACK, weights)
    work = np.diff(marks.work[[0, *found, marks.end]])
    sent = [int(marks.sent[mark, marks.end]) for mark in found]
    return StagePlan(contiguous(count), tuple(found), int(work.max()), max(sent, default=0))


def _stop(marks: CutPoints, start: int, work: float, weights: float) -> int:
    """The last mark that a run from `start` may end at."""
    ends = (bisect_right(sums, sums[start] + most) for sums, most in ((marks.work, work), (marks.weights, weights)))
    return min(ends) - 1


def _reaches(marks: CutPoints, count: int, work: float, weights: float) -> bool:
    at = 0
    for _ in range(count):
        at = _stop(marks, at, work, weights)
    return at == marks.end


def _cheapest(marks: CutPoints, count: int, work: float, weights: float) -> list[int]:
    """Inner marks such that no run exceeds the limits: fewest bytes, then least sum of squares."""
    best: dict[int, tuple[int, float, list[int]]] = {0: (0, 0.0, [])}
    for stage in range(count):
        reached: dict[int, tuple[int, float, list[int]]] = {}
        for start, (cost, squares, cuts) in best.items():
            for stop in range(start + 1, _stop(marks, start, work, weights) + 1):
                if (stop == marks.end) != (stage == count - 1):
                    continue
                own = 0 if stop == marks.end else int(marks.sent[stop, marks.end])
                taken = float(marks.work[stop] - marks.work[start])
                option = (cost + own, squares + taken**2, [*cuts, stop])
                if stop not in reached or option[:2] < reached[stop][:2]:
                    reached[stop] = option
        best = reached
    return best[marks.end][2][:-1]


def cut_folded(marks: CutPoints, count: int, weights: float) -> StagePlan | None:
    """Cuts into `2 * count` runs, of which rank r has r and `2 * count - 1 - r`; None if there are none."""
    if marks.end < 2 * count:
        return None
    mean = int(marks.work[-1]) / count
    for excess in EXCESS:
        found = _Fold(marks, count, min(mean * (1 + excess), float(marks.work[-1])), weights, _slowest_first).search()
        if found is not None:
            break
    else:
        return None
    price = partial(_bytes_first, 1 / (count * max(float(marks.work[-1]), 1.0) ** 2))
    best = _Fold(marks, count, _slowest(marks, found) * SLACK, weights, price).search()
    assert best is not None
    pairs = zip(best[: count - 1], best[: count - 1 : -1], strict=True)
    sent = [int(marks.sent[pair]) for pair in pairs]
    return StagePlan(folded(count), tuple(best), _slowest(marks, best), max(sent, default=0))


def _slowest(marks: CutPoints, found: list[int]) -> int:
    work = np.diff(marks.work[[0, *found, marks.end]])
    return int((work + work[::-1]).max())


def _slowest_first(value: float, front: Any, back: Any, sent: Any) -> Any:
    """The price of giving a rank two runs, after ranks of price `value`: the work of the slowest."""
    return np.maximum(value, front + back)


def _bytes_first(square: float, value: float, front: Any, back: Any, sent: Any) -> Any:
    """Bytes sent, and a sum of squares that is less than a byte for all stages together: it decides between equals."""
    return value + sent + (front**2 + back**2) * square


class _Fold:
    """Dynamic programming from the outside in: a state (i, j) says that the ranks so far have what is before mark i and
    what is from mark j on."""

    def __init__(
        self, marks: CutPoints, count: int, work: float, weights: float, price: Callable[[float, Any, Any, Any], Any]
    ) -> None:
        self.marks, self.count, self.limit, self.bound, self.price = marks, count, work, weights, price
        self.work, self.weights = (sums.astype(np.float64) for sums in (marks.work, marks.weights))

    def search(self) -> list[int] | None:
        """The inner marks of the least price within the limits."""
        end = self.marks.end
        states: dict[State, float] = {(0, end): 0.0}
        before: list[dict[State, State]] = []
        for left in range(self.count - 1, 0, -1):
            values = np.full((end + 1, end + 1), np.inf)
            sources = np.zeros((end + 1, end + 1), dtype=np.int64)
            for number, (state, value) in enumerate(states.items()):
                rows, columns, prices = self._next(state, value, left)
                better = prices < values[rows, columns]
                values[rows, columns][better] = prices[better]
                sources[rows, columns][better] = number
            known = list(states)
            reached = [(int(i), int(j)) for i, j in np.argwhere(values < np.inf)]
            before.append({state: known[sources[state]] for state in reached})
            states = {state: float(values[state]) for state in reached}
        ends = {state: self._last(state, value) for state, value in states.items()}
        last = min(ends, key=ends.__getitem__, default=None)
        if last is None or ends[last] == np.inf:
            return None
        return self._path(last, before)

    def _path(self, last: State, before: list[dict[State, State]]) -> list[int]:
        middle = self._middle(*last)
        path = [last]
        for steps in reversed(before):
            path.append(steps[path[-1]])
        outside_in = path[-2::-1]
        return [*(i for i, _ in outside_in), middle, *(j for _, j in reversed(outside_in))]

    def _middle(self, i: int, j: int) -> int:
        """The mark that halves the last rank's work best."""
        half = (self.work[i] + self.work[j]) / 2
        return i + 1 + int(np.abs(self.work[i + 1 : j] - half).argmin())

    def _last(self, state: State, value: float) -> float:
        """The price where the last rank does all that is left; infinite where that is too much."""
        i, j = state
        work = self.work[j] - self.work[i]
        if j - i < 2 or work > self.limit or self.weights[j] - self.weights[i] > self.bound:
            return np.inf
        middle = self.work[self._middle(i, j)]
        return float(self.price(value, middle - self.work[i], self.work[j] - middle, 0))

    def _next(self, state: State, value: float, left: int) -> tuple[slice, slice, Floats]:
        """Up to which marks the next rank may do, and at which price, such that the `left` ranks after it can do the
        rest; infinite where that does not fit."""
        i, j = state
        work, weights = self.work, self.weights
        rows = slice(i + 1, bisect_right(work, work[i] + self.limit))
        columns = slice(max(bisect_left(work, work[j] - self.limit), i + 2), j)
        front, back = work[rows, None] - work[i], work[j] - work[None, columns]
        taken = weights[rows, None] - weights[i] + weights[j] - weights[None, columns]
        fits = (front + back <= self.limit) & (taken <= self.bound)
        fits &= work[None, columns] - work[rows, None] <= left * self.limit
        fits &= weights[None, columns] - weights[rows, None] <= left * self.bound
        prices = self.price(value, front, back, self.marks.sent[rows, columns]) if fits.any() else np.inf
        return rows, columns, np.where(fits, prices, np.inf)

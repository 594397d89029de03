"""Cuts into stages are the best there are: compared with all of them."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from xdit_ir.pipefusion.stage_search import SLACK, CutPoints, StagePlan, cut_folded, cut_straight

Tasks = list[tuple[int, int]]
TASKS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=4, max_size=9)


def marks_of(tasks: Tasks, sent: int) -> CutPoints:
    """A mark between any two tasks, given by work and weights; the bytes differ from mark to mark."""
    flops, weights = (np.concatenate([[0], np.cumsum(amounts)]) for amounts in zip(*tasks, strict=True))
    places = np.arange(len(flops))
    return CutPoints(flops, weights, (places[:, None] * sent + places[None, :]) % 7)


def every(marks: CutPoints, count: int, runs: int, bound: float) -> list[tuple[int, int]]:
    """Work of the slowest rank and bytes over all boundaries, for every legal cut into `runs` runs."""
    found = []
    for inner in itertools.combinations(range(1, marks.end), runs - 1):
        edges = [0, *inner, marks.end]
        work, weights = (np.diff(sums[edges]) for sums in (marks.work, marks.weights))
        if runs > count:
            work, weights = work + work[::-1], weights + weights[::-1]
        pairs = zip(inner[: count - 1], inner[: count - 1 : -1] if runs > count else [marks.end] * count, strict=False)
        if weights.max() <= bound:
            found.append((int(work.max()), int(sum(marks.sent[pair] for pair in pairs))))
    return found


def check(marks: CutPoints, cuts: StagePlan | None, options: list[tuple[int, int]], count: int) -> None:
    assert (cuts is None) == (not options)
    if cuts is None:
        return
    least = min(slowest for slowest, _ in options)
    assert cuts.slowest <= least * SLACK
    runs = len(cuts.coordinates)
    inner = cuts.marks
    pairs = zip(inner[: count - 1], inner[: count - 1 : -1] if runs > count else [marks.end] * count, strict=False)
    fewest = min(sent for slowest, sent in options if slowest <= least * SLACK)
    assert sum(int(marks.sent[pair]) for pair in pairs) == fewest


@given(TASKS, st.integers(1, 3), st.integers(0, 5), st.floats(1, 3))
def test_straight(tasks: Tasks, count: int, sent: int, share: float) -> None:
    marks = marks_of(tasks, sent)
    bound = share * float(marks.weights[-1]) / count
    assume(marks.end >= count)
    check(marks, cut_straight(marks, count, bound), every(marks, count, count, bound), count)


@given(TASKS, st.integers(1, 3), st.integers(0, 5), st.floats(1, 3))
def test_folded(tasks: Tasks, count: int, sent: int, share: float) -> None:
    marks = marks_of(tasks, sent)
    bound = share * float(marks.weights[-1]) / count
    check(marks, cut_folded(marks, count, bound), every(marks, count, 2 * count, bound), count)

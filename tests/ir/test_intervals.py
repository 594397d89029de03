"""Windows along a dim, against what each result reads; and the examples that the rules' docstrings give."""

from __future__ import annotations

import doctest
import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_strategies import examples

from xdit_ir.ir.partition import Indices
from xdit_ir.rules import intervals, lookups, views
from xdit_ir.rules.intervals import Window


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Convolutions and poolings, and resizing."""
    size, out = draw(st.integers(1, 12)), draw(st.integers(1, 24))
    kind = draw(st.sampled_from(("nearest", "smooth", "filtered", "placed", "adaptive", "transposed", "sliding")))
    if kind == "placed":
        step, at = (Fraction(draw(st.integers(0, 9)), draw(st.integers(1, 9))) for _ in range(2))
        return Window.placed(size, out, step, at, *draw(st.sampled_from(((0, 1), (1, 2)))))
    if kind == "adaptive":
        return Window.adaptive(size, out)
    if kind == "nearest":
        return Window.resized(size, out)
    if kind == "smooth":
        return Window.tapped(size, out, *draw(st.sampled_from(((0, 1), (1, 2)))))
    if kind == "filtered":
        return Window.around(size, out, draw(st.integers(1, 2)))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    if kind == "transposed":
        reach = draw(st.integers(max(1, padding), 5))
        return Window.transposed(size, max((size - 1) * stride - 2 * padding + reach, 1), stride, padding, reach)
    reach = draw(st.integers(1, min(5, size + 2 * padding)))
    return Window.sliding(size, (size + 2 * padding - reach) // stride + 1, stride, padding, reach)


def read(window: Window, result: int) -> set[int]:
    """The elements of the operand that a result reads."""
    return set(range(window.start(result), window.stop(result))) & set(range(window.size))


@examples(100)
@given(windows(), st.data())
def test_what_is_needed_is_all_that_is_read(window: Window, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, window.out - 1))
    stop = data.draw(st.integers(first + 1, window.out))
    needed = window.needed(Indices.range(first, stop))
    assert set(needed.array.tolist()) >= set().union(*(read(window, result) for result in range(first, stop)))


@examples(100)
@given(windows(), st.data())
def test_what_is_made_reads_nothing_else(window: Window, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, window.size - 1))
    held = Indices.range(first, data.draw(st.integers(first + 1, window.size)))
    mine = set(held.array.tolist())
    made = set(window.makes(held).array.tolist())
    assert all(read(window, result) <= mine for result in made)
    first, stop = window.usable(held).runs[0][0] if window.usable(held).runs else 0, 0
    stop = first + window.usable(held).size
    inside = (r for r in range(window.out) if window.start(r) >= first and window.stop(r) <= stop)
    assert made >= set(inside)


@examples(100)
@given(windows(), st.lists(st.integers(0, 12), max_size=3))
def test_every_result_has_its_centre_on_one_rank(window: Window, cuts: list[int]) -> None:
    edges = sorted({0, window.size, *(cut for cut in cuts if cut < window.size)})
    parts = [window.centred(Indices.range(a, b)) for a, b in itertools.pairwise(edges)]
    assert [result for part in parts for result in part.array.tolist()] == list(range(window.out))


def test_what_was_padded_in_front_only_does_not_move_the_cut() -> None:
    """20 elements of which 6 were added in front, read seven at a time: results are cut where the operand was."""
    window = Window.sliding(size=26, out=20, reach=7)
    parts = Indices.range(0, 16), Indices.range(16, 26)
    assert [window.centred(part).size for part in parts] == [13, 7]
    known = replace(window, shift=6)
    assert [known.centred(part).size for part in parts] == [10, 10]


@pytest.mark.parametrize("module", [intervals, lookups, views])
def test_examples_in_docstrings(module: object) -> None:
    outcome = doctest.testmod(module)  # type: ignore[arg-type]
    assert outcome.attempted and not outcome.failed

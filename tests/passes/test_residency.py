"""Which weights stay on the GPU while others stream."""

from __future__ import annotations

import itertools

import pytest

from xdit_ir.passes.residency import Brought, staying


def chosen(sizes: list[int], seconds: list[float], budget: int) -> list[bool]:
    """For units that need one thing each: whether it stays."""
    begins = [0.0, *itertools.accumulate(seconds)]
    found = staying({str(n): Brought(size, (n,)) for n, size in enumerate(sizes)}, begins, begins[-1], budget)
    return [str(n) in found for n in range(len(sizes))]


@pytest.mark.parametrize("budget", [0, 90, 100, 450, 777, 2000])
def test_as_much_stays_as_may(budget: int) -> None:
    """But for a unit at most."""
    stays = sum(100 for stay in chosen([100] * 12, [1.0] * 12, budget) if stay)
    assert budget - 100 < stays <= budget or stays == 1200


def test_it_is_spread_over_the_time_and_begins_with_the_first() -> None:
    assert chosen([100] * 12, [1.0] * 12, 400) == [True, False, *[True, False, False] * 3, False]
    assert chosen([100] * 12, [1.0] * 12, 600) == [True, False] * 6


def test_what_does_little_work_for_its_bytes_stays() -> None:
    assert chosen([100] * 6, [0.1, 0.1, 0.1, 1.0, 1.0, 1.0], 300)[:3] == [True, True, True]


def test_what_many_units_need_stays_first() -> None:
    stored = {"shared": Brought(100, (0, 1, 2, 3)), **{str(n): Brought(100, (n,)) for n in range(4)}}
    assert staying(stored, [0.0, 1.0, 2.0, 3.0], 4.0, 100) == {"shared"}

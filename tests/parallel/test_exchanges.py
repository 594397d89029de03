"""Communications one by one, on real processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
DEGREES = [{"ulysses": 2}, {"ring": 2}, {"ring": 2, "ulysses": 2}]


def _run(workers: Pools, job: str, degrees: dict[str, int]) -> list[Any]:
    count = 1
    for degree in degrees.values():
        count *= degree
    return workers(count).run(job, degrees=degrees)


@pytest.mark.parametrize("degrees", DEGREES)
def test_every_change_of_layout(workers: Pools, degrees: dict[str, int]) -> None:
    for counts in _run(workers, "reshuffles", degrees):
        assert counts.pop("wrong") == 0
        assert set(counts) == {"gather", "all_to_all", "halo_exchange"}


@pytest.mark.parametrize("degrees", DEGREES)
def test_sums(workers: Pools, degrees: dict[str, int]) -> None:
    for right in _run(workers, "reductions", degrees):
        assert all(right)


@pytest.mark.parametrize("degrees", DEGREES)
def test_ring_attention(workers: Pools, degrees: dict[str, int]) -> None:
    for errors in _run(workers, "rings", degrees):
        assert max(errors) < 1e-5


def test_groups_are_in_rank_order(workers: Pools) -> None:
    for degrees in ({"ring": 2, "ulysses": 2}, {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}):
        for found in _run(workers, "order", degrees):
            assert len(found) >= 2
            for both in found.values():
                split = both.index(-1)
                assert both[:split] == both[split + 1 :]

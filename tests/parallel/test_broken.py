"""Runtimes that are broken on one rank, on real processes: comparing outputs shows it, or the handshake does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
BROKEN = ("pieces to the wrong ranks", "own summand only")


@pytest.mark.parametrize("how", BROKEN)
def test_some_rank_differs(workers: Pools, how: str) -> None:
    results = workers(2).run("broken_runtime", how=how)
    assert max(result["before"] for result in results) < 1e-5
    assert max(result["after"] for result in results) > 1e-4


def test_the_handshake_refuses_other_programs(workers: Pools) -> None:
    for result in workers(2).run("other_program"):
        assert result["error"] == "MismatchError", result

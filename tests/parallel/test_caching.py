"""Step caches in unmodified pipelines on processes: the latents of diffusers' own cache on one, and as many calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
CASES = [
    ("flux", {"ulysses": 2}, 1.0, 1),
    ("wan", {"cfg": 2}, 0.5, 2),  # pairs of calls: each half remembers its own
    ("qwen", {"ring": 2}, 1.5, 1),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The pairs of calls; all cases with `--pipelines-all`."""
    cases = CASES if metafunc.config.getoption("--pipelines-all") else CASES[1:2]
    metafunc.parametrize(("name", "degrees", "threshold", "shared"), cases, ids=str)


def test_latents_are_those_of_one_process_with_a_cache(
    workers: Pools, name: str, degrees: dict[str, int], threshold: float, shared: int
) -> None:
    results = workers(2).run("cached_pipelines", name=name, degrees=degrees, threshold=threshold, steps=5)
    for result in results:
        assert "error" not in result, result
        assert max(result["errors"]) <= 1e-4, result
        assert result["reused"] > 1e-3, "leaving blocks out shows"
    calls, skipped = results[0]["want"]
    assert skipped > 0
    for place in (0, 1):
        of_all = sum(result["got"][place] for result in results) // (2 // shared)
        assert of_all == 2 * (calls, skipped)[place], "of both requests"

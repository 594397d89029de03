"""Step caches in unmodified pipelines on processes: the latents of diffusers' own cache on one, and as many calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
CASES = [
    ("flux", {"ulysses": 2}, 1.0, 1),
    ("wan", {"cfg": 2}, 0.5, 2),  # pairs of calls: each half remembers its own
    ("qwen", {"ring": 2}, 1.5, 1),
]
FURTHER = [("wan", {"cfg": 2, "ulysses": 2}, 0.5, 2), ("flux", {"ring": 2}, 1.0, 1), ("qwen", {"ulysses": 2}, 1.5, 1)]


MODULES = [
    ("flux", {"ulysses": 2}, ["taylor", "broadcast"], {}),
    ("wan", {"cfg": 2, "ulysses": 2}, ["taylor"], {}),
    ("wan", {"ulysses": 2}, ["taylor", "broadcast", "lite"], {}),
    ("qwen", {"ring": 2}, ["taylor"], {}),  # a program for each of the calls of a step
    ("flux", {"ring": 2}, ["lite", "faster"], {}),
    ("flux", {"cfg": 2, "ulysses": 2}, ["taylor"], {"guidance": True, "true_cfg_scale": 2.0}),
    ("flux", {"cfg": 2, "ulysses": 2}, ["broadcast"], {"num_images_per_prompt": 2}),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The pairs of calls, with diffusers' own configurations; all cases with `--pipelines-all`."""
    if "caches" in metafunc.fixturenames:
        some = MODULES if metafunc.config.getoption("--pipelines-all") else MODULES[:1]
        metafunc.parametrize(("name", "degrees", "caches", "more"), some, ids=str)
        return
    everything, hooked = metafunc.config.getoption("--pipelines-all"), "hooked" in metafunc.function.__name__
    cases = CASES + FURTHER * hooked if everything else CASES[1:2] * hooked
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


def test_hooked_caches_of_single_modules_are_taken_over(
    workers: Pools, name: str, degrees: dict[str, int], caches: list[str], more: dict[str, Any]
) -> None:
    count = math.prod(degrees.values())
    job = {"name": name, "degrees": degrees, "caches": caches, "more": more, "steps": 6}
    ranks = workers(count).run("hooked_modules", **job)
    assert all(isinstance(rank, list) for rank in ranks), ranks
    *found, without = zip(*ranks, strict=True)
    assert max(one["error without"] for one in without) <= 1e-4
    for results in found:
        for result in results:
            assert max(result["errors"]) <= 1e-4, result
            assert result["reused"] > 1e-3, "reusing shows"
        calls, skipped = results[0]["want"]
        assert skipped > 0
        shared = degrees.get("cfg", 1) if calls > job["steps"] else 1  # ranks that run other calls
        assert [sum(result["got"][of] for result in results) * shared // count for of in (0, 1)] == [
            2 * calls,
            2 * skipped,
        ]


def test_hooked_caches_are_taken_over_before_and_after_a_port(
    workers: Pools, name: str, degrees: dict[str, int], threshold: float, shared: int
) -> None:
    count = math.prod(degrees.values())
    results = workers(count).run("hooked_pipelines", name=name, degrees=degrees, threshold=threshold, steps=5)
    for *caches, without in results:
        assert without["error without"] <= 1e-4, without
        for cache in caches:
            assert max(cache["errors"]) <= 1e-4, cache
            assert cache["reused"] > 1e-3, "leaving blocks out shows"
    for place, cache in enumerate(caches):
        calls, skipped = cache["want"]
        assert skipped > 0
        got = [sum(result[place]["got"][of] for result in results) * shared // count for of in (0, 1)]
        assert got == [calls, skipped]

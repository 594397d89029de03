"""Guidance by two calls a step: each half of `cfg` runs one of them, in unmodified pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
STEPS = 2


def check(results: list[dict[str, Any]], runs: list[int], warned: list[int]) -> None:
    for result in results:
        assert result["difference"] <= 1e-5, result
        assert result["spread"] > 0.01, "the video shows something"
    assert [result["runs"] for result in results] == runs
    assert [result["warned"] for result in results] == warned


@pytest.mark.parametrize("tokens", [16, 12], ids=["equal", "shorter negative prompt"])
def test_one_forward_a_step(workers: Pools, tokens: int) -> None:
    results = workers(2).run("guidance", degrees={"cfg": 2}, steps=STEPS, negative_tokens=tokens)
    check(results, [STEPS, STEPS], [0, 0])


def test_the_halves_of_cfg_divide_their_forwards_further(workers: Pools, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    results = workers(4).run("guidance", degrees={"cfg": 2, "ulysses": 2}, steps=STEPS)
    check(results, [STEPS] * 4, [0] * 4)
    for result in workers(4).run("guidance", degrees={"cfg": 2, "ulysses": 2}, steps=STEPS, readers=[0]):
        assert result["error"] == "MismatchError", "one rank of a half cannot run alone"
        assert "it reads the result of its last one" in result["message"]


def test_reading_early_is_right_and_slower(workers: Pools) -> None:
    results = workers(2).run("guidance", degrees={"cfg": 2}, steps=STEPS, readers=[0, 1])
    check(results, [2 * STEPS, 2 * STEPS], [1, 1])


def test_one_rank_may_read_early(workers: Pools) -> None:
    """A log or a preview on one rank: nobody waits for ever."""
    results = workers(2).run("guidance", degrees={"cfg": 2}, steps=STEPS, readers=[0], limit=100)
    check(results, [2 * STEPS, 2 * STEPS], [1, 1])


def test_a_batch_that_can_be_divided_is(workers: Pools) -> None:
    results = workers(2).run("guidance", degrees={"cfg": 2}, steps=STEPS, prompts=2)
    check(results, [2 * STEPS, 2 * STEPS], [0, 0])

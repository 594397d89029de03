"""Guidance by three and more branches, in one batch or by several calls, also in a part of the steps only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
ONE, TWO, THREE = [1], [1, 1], [1, 1, 1]


def check(results: list[dict[str, Any]], runs: int) -> None:
    for one in results:
        assert one.get("error") is not None and "message" not in one, one
        assert one["error"] <= 1e-5, one
        assert one["runs"] <= runs, one


def test_guidance_that_starts_and_ends(workers: Pools) -> None:
    """By calls: one rank each where there are two, and both the same where there is one."""
    results = workers(2).run("branches", degrees={"cfg": 2}, steps=[ONE, TWO, TWO, ONE])
    check(results, runs=4)
    assert all(one["programs"] == 1 for one in results), "a step without guidance is traced no second time"


def test_three_calls_over_two_ranks(workers: Pools) -> None:
    """Two at once, and the third when it is read."""
    results = workers(2).run("branches", degrees={"cfg": 2}, steps=[THREE] * 3)
    check(results, runs=6)
    assert not any(one["told"] for one in results)


def test_a_batch_whose_size_changes(workers: Pools) -> None:
    """Three samples are 2 + 1, two 1 + 1; a single one waits for a further call, which there is not."""
    check(workers(2).run("branches", degrees={"cfg": 2}, steps=[[3], [2], [1], [3]]), runs=4)


def test_three_ranks(workers: Pools) -> None:
    """As many calls as ranks at once; what is read sooner is run by as many ranks as there are calls."""
    results = workers(3).run("branches", degrees={"cfg": 3}, steps=[THREE, TWO, ONE, THREE])
    check(results, runs=4)
    assert [one["runs"] for one in results] == [4, 4, 3], "the third rank had none of two calls"
    check(workers(3).run("branches", degrees={"cfg": 3}, steps=[[3], [2], [2, 1], [1]]), runs=5)


def test_a_batch_smaller_than_the_ranks_is_told(workers: Pools) -> None:
    for one in workers(3).run("branches", degrees={"cfg": 3}, steps=[[2], [2]]):
        assert one["error"] <= 1e-5 and len(one["told"]) == 1, one
        assert "cfg=3: a call has a batch of fewer samples, which ranks share" in one["told"][0]


def test_what_one_rank_reads_while_two_calls_wait(workers: Pools) -> None:
    """A first call it runs alone; for two the others would have to run them too: all raise, nobody waits."""
    for one in workers(3).run("branches", degrees={"cfg": 3}, steps=[THREE] * 2, reads=1, limit=60):
        assert one["error"] <= 1e-5, one
    for one in workers(3).run("branches", degrees={"cfg": 3}, steps=[THREE], reads=2, limit=60):
        assert one["error"] == "MismatchError" and "reads the result of its last one" in one["message"], one


@pytest.mark.parametrize("leaf", [False, True])
def test_a_model_that_draws_noise(workers: Pools, leaf: bool) -> None:
    """Calls that ranks share out would draw alike, and leave other numbers to what is drawn after them."""
    for degrees in ({"ulysses": 2}, {"cfg": 2}):
        for one in workers(2).run("noisy", degrees=degrees, leaf=leaf):
            assert one["error"] <= 1e-5, one
            assert one["told"] == ("cfg" in degrees)
    for one in workers(2).run("noisy", degrees={"pipefusion": 2}, leaf=leaf):
        assert one["error"] == "ParallelizeError" and "draws random numbers" in one["message"], one


def test_inputs_that_are_given_back(workers: Pools) -> None:
    assert workers(2).run("inputs_given_back", degrees={"cfg": 2}) == [[True] * 4] * 2
    assert workers(2).run("inputs_given_back", degrees={"ulysses": 2}) == [[True] * 4] * 2


def test_weights_that_change_while_a_call_waits(workers: Pools) -> None:
    """What changes them by a method of the port waits for the call; else its result is refused, and never wrong."""
    for one in workers(2).run("written_while_waiting", degrees={"cfg": 2}):
        assert max(after for _, after in one.values()) <= 1e-5, one
        assert max(one["loaded"][0], one["cast"][0]) <= 1e-5, one
        ways = ("in place", "other memory", "through data", "through NumPy", "an attribute")
        assert all("weights were written to while a call waited" in one[way][0] for way in ways)


def test_stages_that_meet_inside_a_layer(workers: Pools) -> None:
    for one in workers(2).run("stages_across_a_layer"):
        assert one["error"] <= 1e-5, one


@pytest.mark.parametrize("joined", [False, True], ids=["by calls", "prompts in a batch"])
def test_a_branch_that_skips_layers(workers: Pools, joined: bool) -> None:
    for one in workers(2).run("skipped_layers", degrees={"cfg": 2}, joined=joined):
        assert one["error"] <= 1e-5, one
        assert one["programs"] == (2 if joined else 3), one


@pytest.mark.parametrize("degrees", [{"cfg": 2, "ulysses": 2}, {"cfg": 4}, {"cfg": 2, "pipefusion": 2}], ids=str)
def test_four_processes(workers: Pools, request: pytest.FixtureRequest, degrees: dict[str, int]) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    warm = {"warmup_steps": 9} if "pipefusion" in degrees else {}
    steps = [[1, 1, 1, 1], [1, 1, 1], [2], [1], [4]]
    check(workers(4).run("branches", degrees=degrees | warm, steps=steps), runs=99)

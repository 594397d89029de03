"""`port(..., data=N)`: N replicas on N times the processes, each of which runs requests of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]
DEGREES = [{"ulysses": 2}, {"cfg": 2}, {"pipefusion": 2, "patches": 2}, {"ring": 2}]


def check(results: list[dict[str, Any]], data: int) -> None:
    assert all("errors" in one for one in results), results
    size = len(results) // data
    assert [one["replica"] for one in results] == [[rank // size, rank % size] for rank in range(len(results))], results
    for one in results:
        assert len(one["errors"]) == 1 + 2 * one["replica"][0] and max(one["errors"]) <= 1e-5, one


@pytest.mark.parametrize("degrees", [{"ulysses": 1}, {}], ids=["given", "planned"])
def test_replicas_of_one_process(workers: Pools, degrees: dict[str, int]) -> None:
    results = workers(2).run("replicas", degrees=degrees, data=2, initialised=False)
    check(results, 2)
    assert ["".join(one["share"]) for one in results] == ["ab", "cde"], "what all of them make, shared out"


def test_replicas_of_two_processes(workers: Pools) -> None:
    """Each makes calls of its own, of which the other knows nothing."""
    check(workers(4).run("replicas", degrees={"ulysses": 2}, data=2, initialised=True), 2)


@pytest.mark.parametrize("degrees", DEGREES[1:], ids=str)
def test_all_degrees(workers: Pools, request: pytest.FixtureRequest, degrees: dict[str, int]) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    check(workers(4).run("replicas", degrees=degrees, data=2, initialised=True), 2)


def test_a_failure_stays_in_its_replica(workers: Pools) -> None:
    for one in workers(4).run("failing_replica", degrees={"ulysses": 2}, data=2):
        assert one["error"] == ("MismatchError" if one["replica"] else ""), one
        assert one["afterwards"] <= 1e-5, one


def test_weights_are_compared_within_a_replica(workers: Pools) -> None:
    assert max(workers(4).run("other_weights_in_replicas", degrees={"ulysses": 2}, data=2)) <= 1e-5


def test_processes_that_disagree_on_data(workers: Pools) -> None:
    """Whoever comes later is told; the complete replica is right, the other one waits for its time-out."""
    pool = workers(4)
    pool.stop()  # what divides a job first, counts
    results = pool.run("differing_data")
    pool.stop()
    told = [one["message"] for one in results if one["error"] == "MismatchError"]
    assert told and all("the processes differ in data=" in text for text in told), results
    assert {one["error"] for one in results} <= {"", "MismatchError", "LostError"}, results


def test_what_does_not_fit_the_job(workers: Pools) -> None:
    for alone, three, four, none in workers(2).run("refused_data"):
        assert alone == "", "a module that is not divided may run on any process"
        assert "into replicas of equal size, and this job has 2; nearest legal: data=2" in three
        assert "ulysses=2 x data=2 needs 4 processes, this job has 2; nearest legal: data=1, or start" in four
        assert "data=0 is not a positive integer" in none

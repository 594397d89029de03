"""Ranks that disagree, raise, stop or end: all others raise, within seconds, and are right again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xdit_ir.tools.soak import soak

Pools = Callable[[int], Any]
DEGREES = [{"ulysses": 2}, {"cfg": 2}, {"pipefusion": 2, "patches": 2}]
P2 = DEGREES[-1]
SECONDS = 20


def check(results: list[dict[str, Any]], *errors: str) -> None:
    for result in results:
        assert result["error"] in errors, result
        assert result["seconds"] < SECONDS, result
        assert result.get("afterwards", 0.0) <= 1e-5, result


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("how", ["port", "emit"])
def test_other_inputs_on_a_rank(workers: Pools, how: str, degrees: dict[str, int]) -> None:
    for result in workers(2).run("disagreement", how=how, degrees=degrees):
        check(result, "MismatchError")


def test_what_differs_in_a_request_is_named(workers: Pools) -> None:
    """The argument, or, where all arguments are the same, which call of the request it is."""
    for latents, place in workers(2).run("disagreement_in_a_request", degrees=P2):
        check([latents, place], "MismatchError")
        assert latents["message"].startswith("x: its contents differ: rank 1"), latents
        assert "the place of the call" in place["message"] and "a new request" in place["message"], place


def test_without_comparison_other_inputs_make_a_wrong_result(workers: Pools) -> None:
    """So the test above would see if it were left out."""
    assert min(workers(2).run("unnoticed", degrees=DEGREES[0])) > 1e-2


@pytest.mark.parametrize("degrees", [DEGREES[0], P2])
def test_a_scheduler_that_does_something_else(workers: Pools, degrees: dict[str, int]) -> None:
    """It goes into a call, and is noticed with the next one at the latest."""
    for found in workers(2).run("other_scheduler", degrees=degrees):
        check(found, "MismatchError", "LostError")
        assert all(result["late"] <= 1 for result in found), found


@pytest.mark.parametrize(("how", "degrees"), [("port", DEGREES[0]), ("emit", DEGREES[1]), ("port", P2)])
def test_other_weights_on_a_rank(workers: Pools, how: str, degrees: dict[str, int]) -> None:
    """The last weight, which under PipeFusion one rank only uses."""
    for result in workers(2).run("other_weights", how=how, degrees=degrees):
        check(result, "MismatchError")


def test_other_tensors_in_attributes(workers: Pools) -> None:
    for result in workers(2).run("other_attributes", degrees=DEGREES[0]):
        check(result, "MismatchError")


def test_modules_in_another_order(workers: Pools) -> None:
    check(workers(2).run("another_order", degrees=DEGREES[0]), "MismatchError")


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("how", ["port", "emit"])
def test_a_rank_raises_inside_a_forward(workers: Pools, how: str, degrees: dict[str, int]) -> None:
    other, failing = workers(2).run("raises_inside", how=how, degrees=degrees)
    check([other], "LostError")
    check([failing], "ArithmeticError")
    assert "rank 1 left call" in other["message"] and "ArithmeticError: injected" in other["message"]


@pytest.mark.parametrize("degrees", DEGREES)
def test_whatever_happens_to_a_rank_all_raise(workers: Pools, degrees: dict[str, int]) -> None:
    """Faults as a table, the mutations of a running rank: none is missed, and all ranks are right again after each."""
    other, failing = workers(2).run("failing", degrees=degrees)
    assert len(other) >= 13
    for name, result in other.items():
        assert result["error"] in ("LostError", "MismatchError"), (name, result)
        assert failing[name]["error"], (name, failing[name])
        assert max(result["seconds"], failing[name]["seconds"]) < SECONDS, (name, result, failing[name])
        assert max(result["afterwards"], failing[name]["afterwards"]) <= 1e-5, (name, result, failing[name])


LOST = [("killed", DEGREES[0]), ("stopped", DEGREES[1]), ("stopped", P2), ("ended", P2), ("asleep", DEGREES[0])]


@pytest.mark.parametrize(("how", "degrees"), LOST)
def test_a_rank_is_lost_inside_a_forward(workers: Pools, how: str, degrees: dict[str, int]) -> None:
    pool = type(workers(2))(2)
    try:
        [result] = pool.run("is_lost", lost=[1], how=how, degrees=degrees, seconds=5)
    finally:
        pool.stop()
    check([result], "LostError")
    assert "rank 1" in result["message"] and result["again"] == "LostError", result


def test_a_rank_leaves_out_a_call(workers: Pools) -> None:
    """The other gives up after the `timeout`; each of them hears of it once."""
    waiting, away = workers(2).run("leaves_out_a_call", degrees=DEGREES[0], seconds=3)
    assert "rank 1 is alive, but did not make call" in waiting["message"]
    check([waiting], "LostError")
    assert (waiting["again"], away["again"]) == ("", "LostError") or away["error"] == "", (waiting, away)


@pytest.mark.parametrize("degrees", [DEGREES[0], P2])
def test_two_threads_are_right_or_refused(workers: Pools, degrees: dict[str, int]) -> None:
    for result in workers(2).run("two_threads", degrees=degrees):
        assert all(one == "refused" or (isinstance(one, float) and one <= 1e-5) for one in result), result


@pytest.mark.parametrize("degrees", [DEGREES[0], P2])
def test_threads_and_files_are_given_back(workers: Pools, degrees: dict[str, int]) -> None:
    for counts in workers(2).run("given_back", degrees=degrees):
        assert counts[-1] == counts[0], counts


def test_barriers_of_the_caller(workers: Pools) -> None:
    assert max(workers(2).run("barriers", degrees=P2)) <= 1e-5


def test_a_stream_of_fewer_rows_than_ranks_ends(workers: Pools) -> None:
    """Ranks without rows take part in all exchanges."""
    for result in workers(2).run("equal_outputs", name="anyflow-far-joint", degree_sets=[DEGREES[0]], limit=120):
        assert max(result["errors"]) < 1e-5


def test_a_short_soak() -> None:
    """`python -m xdit_ir.tools.soak` is the long one."""
    assert soak(seconds=1, ranks=[2], seed=3, faults=3) == 0

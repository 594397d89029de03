"""`port` without degrees, on processes: rank 0 plans, all ranks take what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import xdit_ir as xir

Pools = Callable[[int], Any]


def test_without_degrees_all_processes_share_the_work(workers: Pools) -> None:
    first, second = workers(2).run("planned", name="plain-dit", given={})
    assert max(first["errors"] + second["errors"]) < 1e-5
    assert first["degrees"] == second["degrees"] and first["degrees"]["pipefusion"] == 1
    assert sorted(first["degrees"].values())[-2:] == [1, 2]
    [line] = first["said"]
    assert (
        "on 2 x cpu" in line and ": took" in line and "ms a step" in line and "; next " in line and not second["said"]
    )


def test_a_degree_that_is_given_is_kept(workers: Pools) -> None:
    for result in workers(2).run("planned", name="plain-dit", given={"cfg": 1, "ring": 1, "pipefusion": 1}):
        assert max(result["errors"]) < 1e-5
        assert set(result["degrees"].values()) == {1}, "each process by itself"
    for result in workers(2).run("planned", name="plain-dit", given={"ring": 2}):
        assert max(result["errors"]) < 1e-5 and result["degrees"]["ring"] == 2 and not result["said"]


def test_given_degrees_are_priced_by_hosts_too(workers: Pools) -> None:
    for given, links in (({"ring": 2}, 2), ({"ring": 2, "machine": xir.Machine()}, 1)):
        for result in workers(2).run("on_hosts", name="plain-dit", given=given):
            assert result["error"] < 1e-5 and result["links"] == links


def test_weights_over_ranks(workers: Pools) -> None:
    for result in workers(2).run("planned", name="plain-dit", given={"shard_weights": True}):
        assert max(result["errors"]) < 1e-5 and sorted(result["degrees"].values()) == [1, 1, 1, 1, 2]


def test_a_port_that_holds_its_weights_may_part_them(workers: Pools) -> None:
    for result in workers(2).run("planned", name="plain-dit", given={"release": True}):
        assert max(result["errors"]) < 1e-5 and sorted(result["degrees"].values()) == [1, 1, 1, 1, 2]


def test_four_processes(workers: Pools, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    for result in workers(4).run("planned", name="plain-dit", given={"ulysses": 2}):
        assert max(result["errors"]) < 1e-5 and result["degrees"]["ulysses"] == 2
        assert sorted(result["degrees"].values()) == [1, 1, 1, 2, 2]
    for result in workers(4).run("planned", name="plain-dit", given={"tensor": 2}):
        assert max(result["errors"]) < 1e-5 and result["degrees"]["tensor"] == 2
        assert sorted(result["degrees"].values()) == [1, 1, 1, 2, 2]


def test_what_rank_0_cannot_plan_raises_everywhere(workers: Pools) -> None:
    for first, then in workers(2).run("unplannable"):
        assert first["error"] == "ParallelizeError" and "degrees cannot be planned" in first["message"], first
        assert "ZeroDivisionError" in first["message"] and first["seconds"] < 60
        assert then["error"] == "", then


def test_degrees_that_some_ranks_give_and_others_plan(workers: Pools) -> None:
    for first, then in workers(2).run("planned_by_some", name="plain-dit", limit=120):
        assert first["error"] == "MismatchError" and first["seconds"] < 60, first
        assert "the ranks' calls differ" in first["message"] and "must give port the same" in first["message"]
        assert then["error"] == "", then


def test_a_saved_plan(workers: Pools) -> None:
    for result in workers(2).run("saved_plan", name="plain-dit"):
        assert result["error"] < 1e-5
        assert result["degrees"] == {name: result["best"][name] for name in result["degrees"]}
        assert result["refused"]["error"] == "ParallelizeError"
        assert "plan= is for 1 processes, this job has 2" in result["refused"]["message"]

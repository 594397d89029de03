"""`port(plan=...)` in one process: a plan is for one model and number of processes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.planning.hardware import load
from xdit_ir.porting import planned
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.worth import Worth, may_pay

EXAMPLE = {"input": torch.ones(2, 8)}


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8)).requires_grad_(False)


def test_one_process_runs_the_model_as_before() -> None:
    model = net()
    ported = xir.port(model)
    assert torch.equal(ported(**EXAMPLE), model(**EXAMPLE))
    assert ported.program is not None and ported.program.world_size == 1


def test_one_gpu_without_room_for_the_weights_has_some_of_them_with_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the port holds them itself; a model that keeps its weights is never asked to give them up."""
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16))).requires_grad_(False)
    x = torch.randn(2, 64)
    small = replace(load("h100"), memory=16 * 64 * 65 * 4 * 0.8)
    monkeypatch.setattr(planned, "hardware_here", lambda device: small)
    want, kept = deep(x), xir.port(deep)
    assert torch.equal(kept(x), want) and not kept.report().gathered.uploaded
    ported = xir.port(deep, release=True)
    torch.testing.assert_close(ported(x), want)
    [told] = ported.report().memory
    assert 0 < told.total <= small.memory and told.host > 0
    assert all(parameter.is_meta for parameter in deep.parameters())


def test_a_plan_for_this_model() -> None:
    model = net()
    ported = xir.port(model, plan=xir.plan(model, EXAMPLE, gpus=1))
    assert torch.equal(ported(**EXAMPLE), model(**EXAMPLE))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": "u2"}, r"plan='u2' is no xdit_ir\.Plan"),
        ({"ulysses": 1}, r"ulysses=1 beside plan=, which has u1: give one of them"),
        ({"patches": 4}, r"patches=4 beside plan="),
    ],
)
def test_what_no_port_takes(given: dict[str, Any], said: str) -> None:
    model = net()
    with pytest.raises(xir.ParallelizeError, match=said):
        xir.port(model, **{"plan": xir.plan(model, EXAMPLE, gpus=1), **given})


def test_a_plan_for_another_model_or_job() -> None:
    model = net()
    with pytest.raises(xir.ParallelizeError, match=r"plan= was made for a Sequential with weights .* make one with"):
        xir.port(net(16), plan=xir.plan(model, EXAMPLE, gpus=1))
    with pytest.raises(xir.ParallelizeError, match=r"plan= is for 2 processes, this job has 1"):
        xir.port(model, plan=xir.plan(model, EXAMPLE, gpus=2))


class Rank:
    """A rank of two on so many hosts, which hears what was `told` where it is not the first."""

    def __init__(self, rank: int, device: str, *hosts: str, told: Any = None) -> None:
        self.rank, self.device, self.hosts = rank, torch.device(device), hosts
        self.said: list[Any] = []
        self._told = told

    def of_all(self, value: Any) -> list[Any]:
        self.said.append(value)
        if len(self.said) == 1:
            return list(self.hosts)
        return [value if self._told is None else self._told, value]

    def agreed(self, error: Exception) -> Exception:
        return error


def test_given_degrees_are_priced_by_the_machine_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "hardware_here", lambda device: load("l20"))
    first = Rank(0, "cuda", "here", "here")
    assert planned.machine_of_job(first) == load("l20").prices  # type: ignore[arg-type]
    monkeypatch.setattr(planned, "hardware_here", lambda device: load("h200"))
    other = Rank(1, "cuda", "here", "here", told=json.loads(json.dumps(first.said[1])))
    assert planned.machine_of_job(other) == load("l20").prices  # type: ignore[arg-type]
    apart = planned.machine_of_job(Rank(0, "cuda", "here", "there"))  # type: ignore[arg-type]
    assert apart == load("h200").on_hosts(1).prices
    assert planned.machine_of_job(Rank(0, "cpu", "here", "here")) == xir.Machine()  # type: ignore[arg-type]


def test_a_machine_that_cannot_be_read_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Any:
        raise xir.ParallelizeError("no machine as `xdit-ir calibrate` writes it")

    monkeypatch.setattr(planned, "hardware_here", broken)
    first = Rank(0, "cuda", "here", "here")
    for rank in (first, Rank(1, "cuda", "here", "here", told={"refused": "no machine"})):
        with pytest.raises(xir.ParallelizeError, match="no machine"):
            planned.machine_of_job(rank)  # type: ignore[arg-type]
    assert "refused" in first.said[1]


def test_an_encoder_that_pays_on_slow_gpus_only_is_refused_where_all_know_of_a_fast_one() -> None:
    with torch.device("meta"):
        encoder = nn.Linear(30000, 30000)
    ids = Arguments((torch.zeros(1, 4096, dtype=torch.long),), {})
    worth = Worth(encoder, load("l20").machine, traced=False)
    assert may_pay(encoder, load("l20").machine) and not may_pay(encoder, xir.Machine())
    assert worth.whole(ids) == ""
    worth.check_call(ids, load("l20").prices)
    with pytest.raises(xir.ParallelizeError, match=r"it takes about 14\.7 ms"):
        worth.check_call(ids, load("h200").prices)

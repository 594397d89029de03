"""`port(plan=...)` in one process: a plan is for one model and number of processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.planning.hardware import load
from xdit_ir.porting import planned

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

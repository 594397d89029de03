"""Jobs of replicas: each process compares what its own replica makes with one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from failure_jobs import CHANGES, Example, _error
from jobs import Degrees, _failure, _rank

import xdit_ir as xir
from xdit_ir import models


def _made(degrees: Degrees, data: int) -> tuple[Any, Any, Example, xir.Replica]:
    """A port, its model, and an example that each replica has its own of."""
    torch.set_num_threads(1)
    model, example = models.load("plain-dit:tiny")
    port = xir.port(model, **degrees, data=data, timeout=60)
    mine = xir.replica(port)
    return port, model, example | {"x": example["x"] + mine.index}, mine


def replicas(degrees: Degrees, data: int, initialised: bool) -> dict[str, Any]:
    """Replicas that make other calls, and other numbers of them, of other shapes."""
    if initialised and not dist.is_initialized():
        dist.init_process_group("gloo")
    port, model, example, mine = _made(degrees, data)
    larger = {name: torch.cat([value, value.flip(0)]) for name, value in example.items()}
    calls = [example, *[larger, example] * mine.index]
    errors = [_error(port, model, call) for call in calls]
    return {"errors": errors, "replica": [mine.index, mine.rank], "share": mine.share("abcde")}


def failing_replica(degrees: Degrees, data: int) -> dict[str, Any]:
    """In the last replica only, one rank has another input: what is raised where, and how right all is afterwards."""
    port, model, example, mine = _made(degrees, data)
    _error(port, model, example)
    wrong = mine.index == mine.count - 1 and mine.rank == 1
    other = example | (CHANGES["latents"](example) if wrong else {})
    found = _failure(lambda: _error(port, model, other))
    return found | {"afterwards": _error(port, model, example), "replica": mine.index}


def other_weights_in_replicas(degrees: Degrees, data: int) -> float:
    """Replicas may hold other weights: they are never compared."""
    port, model, example, mine = _made(degrees, data)
    with torch.no_grad():
        next(model.parameters()).add_(mine.index)
    return _error(port, model, example)


def differing_data() -> dict[str, Any]:
    """One process has divided the job into other replicas than the others."""
    data = 1 if _rank() == 3 else 2
    model, example = models.load("plain-dit:tiny")
    port = xir.port(model, ulysses=4 // data, data=data, timeout=5)
    return _failure(lambda: port(**example))


def refused_data() -> list[str]:
    """What `port` says of numbers of replicas that do not fit the job."""
    model, _ = models.load("plain-dit:tiny")
    given: list[dict[str, Any]] = [{"ulysses": 1}, {"data": 3}, {"ulysses": 2, "data": 2}, {"data": 0}]
    return [_failure(lambda one=one: xir.port(model, **one))["message"] for one in given]

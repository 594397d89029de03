"""One rank of an episode of `xdit_ir.tools.soak`: serves requests, and fails as it is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir
from xdit_ir import models

MODEL = "plain-dit:tiny"
TOLERANCE = 1e-4
Fault = tuple[str, int, int]


class InjectedError(Exception):
    """What a rank raises that is told to."""


class SoakServer:
    """Serves requests on one rank; errors of a request do not end it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.model, self.example = models.load(MODEL)
        options = {**plan["degrees"], "timeout": plan["timeout"]}
        if plan["how"] == "emit":
            timeout = options.pop("timeout")
            parallel = xir.trace(self.model, self.example).parallelize(**options)
            self.module: Any = parallel.emit(self.model, timeout=timeout)
        else:
            self.module = xir.port(self.model, **options)
        self.rank, self.steps = dist.get_rank(), plan["steps"]
        self.faults: dict[int, Fault] = {int(place): fault for place, fault in plan["faults"].items()}
        self.final = max(self.faults)
        self.wanted = [self._request(seed, None) for seed in range(plan["requests"])]

    def serve(self) -> None:
        """All requests, each answered by a line; after the failure that leaves ranks dead, no more."""
        request, dropped = 0, False
        while request < len(self.wanted):
            answer = self._answer(request)
            print(answer, flush=True)
            if answer != "right" and request >= self.final and not self._recovers():
                return
            dropped = answer == "dropped"
            if not dropped:
                dist.barrier()
            request += 1
            if dropped:  # the others are still at the request before: both are refused
                self._answer(request)
                dist.barrier()

    def _recovers(self) -> bool:
        return self.faults[self.final][0].split()[0] not in ("kill", "stop")

    def _answer(self, request: int) -> str:
        fault = self.faults.get(request)
        try:
            got = self._request(request, fault if fault is not None and fault[1] == self.rank else None)
        except InjectedError as error:
            return "dropped" if str(error) == "drop" else "injected"
        except xir.XditError as error:
            return f"{type(error).__name__}: {error}".replace("\n", " ")
        want = self.wanted[request]
        apart = ((got - want).norm() / want.norm()).item()
        return "right" if apart <= TOLERANCE else f"wrong by {apart:.1e}"

    @torch.no_grad()
    def _request(self, seed: int, fault: Fault | None) -> torch.Tensor:
        make = torch.Generator().manual_seed(seed)
        shape = self.example["x"].shape
        x = torch.randn(shape, generator=make)
        undo: Callable[[], None] = lambda: None  # noqa: E731
        try:
            for step in range(self.steps):
                t = torch.full_like(self.example["t"], 900 - 150 * step)
                noise = torch.randn(shape, generator=make)
                if fault is not None and fault[2] == step:
                    x, t, noise, undo = self._inject(fault[0], x, t, noise)
                output = self.module(x=x, t=t, y=self.example["y"])
                x = x - output[:, : shape[1]] / self.steps + 0.05 * noise
            return torch.tensor(x.tolist())
        finally:
            undo()

    def _inject(self, kind: str, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> tuple[Any, ...]:
        what, _, where = kind.partition(" ")
        if kind == "drop":
            raise InjectedError(kind)
        if where == "inside":
            return x, t, noise, self._inside(lambda: _fail(what))
        if where == "between":
            _fail(what)
        if kind == "weights":
            weight = next(self.model.parameters())
            with torch.no_grad():
                weight.mul_(1.01)
            return x, t, noise, lambda: _scale(weight, 1 / 1.01)
        x = {"latents": x.flip(-1), "slightly": x * 1.001, "nan": _with_nan(x)}.get(kind, x)
        return x, t + (kind == "time"), noise.flip(-1) if kind == "noise" else noise, lambda: None

    def _inside(self, fail: Callable[[], None]) -> Callable[[], None]:
        bodies = self.module.bodies if hasattr(type(self.module), "bodies") else self._specialisation().bodies
        hooks = [body.module.register_forward_pre_hook(lambda *_: fail()) for body in bodies.values()]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def _specialisation(self) -> Any:
        return self.module._xdit_specialisations.found[0].runner


def _fail(what: str) -> None:
    if what == "raise":
        raise InjectedError(what)
    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    time.sleep(1)  # a signal takes its time


def _scale(weight: nn.Parameter, factor: float) -> None:
    with torch.no_grad():
        weight.mul_(factor)


def _with_nan(x: torch.Tensor) -> torch.Tensor:
    x = x + 0
    x[0, 0, 0, 0] = float("nan")
    return x


def main() -> None:
    """Serve, and leave without taking leave of groups that may be broken."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    SoakServer(json.loads(sys.argv[1])).serve()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

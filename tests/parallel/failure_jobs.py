"""Jobs in which ranks disagree, fail or stop; each returns plain data for the test to judge."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from jobs import Degrees, _failure, _rank, relative_error
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.deferral.deferred import materialize
from xdit_ir.pipelined.channels import Channels
from xdit_ir.runtime.agreement import Agreement
from xdit_ir.transport import collectives, wire
from xdit_ir.transport.direct import DirectSend

Example = dict[str, Any]
Around = Callable[[Any, Any], AbstractContextManager[Any]]


def _made(how: str, degrees: Degrees, **options: Any) -> tuple[Any, Any, Example]:
    """A module, its model and an example; all ranks have the same."""
    torch.set_num_threads(1)
    model, example = models.load("plain-dit:tiny")
    if how == "emit":
        return xir.trace(model, example).parallelize(**degrees).emit(model, **options), model, example
    return xir.port(model, **degrees, **options), model, example


def _runner(module: Any) -> Any:
    made = vars(module).get("_xdit_built") or module._xdit_specialisations.found[0]
    return made.runner


@torch.no_grad()
def _error(module: Any, model: Any, example: Example) -> float:
    return relative_error(materialize(module(**example)), model(**example))


CHANGES: dict[str, Callable[[Example], Example]] = {
    "latents": lambda one: {"x": one["x"].flip(-1)},
    "slightly": lambda one: {"x": one["x"] * 1.001},
    "one element": lambda one: {"x": one["x"].index_fill(-1, torch.tensor([0]), 0.0)},
    "nan": lambda one: {"x": one["x"].masked_fill(one["x"] == one["x"].max(), float("nan"))},
    "timestep": lambda one: {"t": one["t"] + 1},
    "label": lambda one: {"y": one["y"].flip(0)},
}


def disagreement(how: str, degrees: Degrees) -> list[dict[str, Any]]:
    """For each change: what this rank's call raises if rank 1's input is another, and how right it is afterwards."""
    module, model, example = _made(how, degrees)
    _error(module, model, example)
    found = []
    for change in CHANGES.values():
        other = example | (change(example) if _rank() else {})
        found.append(_failure(lambda given=other: _error(module, model, given)))
        found[-1]["afterwards"] = _error(module, model, example)
    return found


@torch.no_grad()
def disagreement_in_a_request(degrees: Degrees) -> list[dict[str, Any]]:
    """While the output of a call is still held, so that the same latents are another call of its step: rank 1 gives
    other latents; or has thrown the output away."""
    module, model, example = _made("port", degrees)
    found = []
    for change in (CHANGES["latents"], None):
        held = [module(**example)]
        if _rank() and change is None:
            held.clear()
        other = example | (change(example) if _rank() and change else {})
        found.append(_failure(lambda given=other: _error(module, model, given)))
        held.clear()
        found[-1]["afterwards"] = _error(module, model, example)
    return found


def unnoticed(degrees: Degrees) -> float:
    """How wrong the result is if rank 1's input is another, and nothing is compared."""
    module, model, example = _made("port", degrees)
    _error(module, model, example)
    with mock.patch.object(Agreement, "call", lambda *_: None):
        return _error(module, model, example | (CHANGES["latents"](example) if _rank() else {}))


Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
# A scheduler's step on latents and output; the last argument is another one on rank 1 after some step.
SCHEDULERS: dict[str, Step] = {
    "noise": lambda x, out, other: x - out + torch.randn(x.shape, generator=torch.Generator().manual_seed(7 + other)),
    "a number": lambda x, out, other: x - out * (0.1 + 0.01 * other),
    "a number in a tensor": lambda x, out, other: x - out * torch.tensor(0.1 + 0.01 * other),
    "an operator": lambda x, out, other: x - (out.clamp(-1, 1) if other else out * 0.5),
}


@torch.no_grad()
def other_scheduler(degrees: Degrees) -> list[dict[str, Any]]:
    """Rank 1's scheduler does something else between two steps; three more are made. `late`: so many after the one
    that takes it."""
    module, model, example = _made("port", degrees)
    late = 0

    def steps(scheduler: Step, changed: int) -> None:
        nonlocal late
        x = example["x"]
        for step in range(5):
            late = step - changed - 1
            out = module(**example | {"x": x})[:, : x.shape[1]]
            x = scheduler(x, out, _rank() if step == changed else 0)
        x.tolist()

    found = []
    for scheduler in SCHEDULERS.values():
        steps(scheduler, -1)
        found.append(_failure(lambda one=scheduler: steps(one, 1)) | {"late": late})
        found[-1]["afterwards"] = _error(module, model, example)
    return found


@torch.no_grad()
def other_weights(how: str, degrees: Degrees) -> list[dict[str, Any]]:
    """Rank 1 has other weights in the first call; then all have the same; then rank 1 changes one, and does it again
    where nobody sees it."""
    module, model, example = _made(how, degrees)
    weight = list(model.parameters())[-1]
    found = []
    for factor, written in ((1.5, weight), (1.01, weight), (1.01, weight.data)):
        if _rank():
            written.mul_(factor)
        found.append(_failure(lambda: _error(module, model, example)))
        if _rank():
            written.mul_(1 / factor)
        found[-1]["afterwards"] = _error(module, model, example)
    return found


class _Scales(nn.Module):
    """With a tensor that is no parameter or buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Linear(8, 8), torch.ones(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factors


@torch.no_grad()
def other_attributes(degrees: Degrees) -> list[dict[str, Any]]:
    """Rank 1 has another tensor in an attribute at the first call, and later, when both write to it."""
    torch.manual_seed(0)
    model, example = _Scales(), {"x": torch.randn(2, 4, 8)}
    module, found = xir.port(model, **degrees), []
    for _ in range(2):
        model.factors.mul_(1 + _rank())
        found.append(_failure(lambda: _error(module, model, example)))
        model.factors.fill_(1.0)
        found[-1]["afterwards"] = _error(module, model, example)
    return found


def another_order(degrees: Degrees) -> dict[str, Any]:
    """Two modules that rank 1 calls in another order."""
    one, model, example = _made("port", degrees)
    two = xir.port(models.load("plain-uvit:tiny")[0], **degrees)
    other = models.load("plain-uvit:tiny")[1]
    calls = [lambda: one(**example), lambda: two(**other)]
    with torch.no_grad():
        for call in calls:
            call()
        found = _failure(lambda: [call() for call in (reversed(calls) if _rank() else calls)])
    found["afterwards"] = _error(one, model, example)
    return found


def raises_inside(how: str, degrees: Degrees) -> dict[str, Any]:
    """Rank 1 raises in the middle of a forward; the others read what they get, and call again."""
    module, model, example = _made(how, degrees)
    _error(module, model, example)

    def bomb(*_: Any) -> None:
        raise ArithmeticError("injected")

    if _rank() == 1:
        for body in _runner(module).bodies.values():
            body.module.register_forward_pre_hook(bomb)
    found = _failure(lambda: _error(module, model, example))
    found["afterwards"] = _error(module, model, example)
    return found


ENDS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "ended": lambda: os._exit(0),
    "asleep": lambda: time.sleep(600),
}


def is_lost(how: str, degrees: Degrees, seconds: float) -> dict[str, Any]:
    """Rank 1 is killed, stopped, ends or does not go on in the middle of a forward."""
    module, model, example = _made("port", degrees, timeout=seconds)
    _error(module, model, example)

    def end(*_: Any) -> None:
        ENDS[how]()

    if _rank() == 1:
        for body in _runner(module).bodies.values():
            body.module.register_forward_pre_hook(end)
    found = _failure(lambda: _error(module, model, example))
    return found | {"again": _failure(lambda: _error(module, model, example))["error"]}


def leaves_out_a_call(degrees: Degrees, seconds: float) -> dict[str, Any]:
    """Rank 1 leaves out a call and waits for a barrier of the caller's."""
    module, model, example = _made("port", degrees, timeout=seconds)
    _error(module, model, example)
    found = _failure(lambda: _rank() or _error(module, model, example))
    dist.barrier()
    again = _failure(lambda: _error(module, model, example))
    return found | {"again": again["error"], "afterwards": _error(module, model, example) if again["error"] else 0.0}


def two_threads(degrees: Degrees) -> list[float | str]:
    """Each of two threads makes calls of its own: errors against the model, or the names of exceptions."""
    module, model, example = _made("port", degrees)
    _error(module, model, example)
    found: list[float | str] = ["hangs", "hangs"]

    def work(place: int) -> None:
        try:
            mine = example | {"x": example["x"] + place}
            found[place] = max(_error(module, model, mine) for _ in range(3))
        except xir.XditError:
            found[place] = "refused"
        except Exception as error:
            found[place] = repr(error)

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def given_back(degrees: Degrees) -> list[list[int]]:
    """Threads and files of this process after each of some modules that came and went."""
    found = []
    for place in range(3):
        module, model, example = _made("emit" if place % 2 else "port", degrees)
        _error(module, model, example)
        if place == 2:
            module.reset()
        del module, model
        gc.collect()
        found.append([len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))])
    return found


@torch.no_grad()
def barriers(degrees: Degrees) -> float:
    """A barrier and a sum of the caller's between calls whose results nobody has read."""
    module, model, example = _made("port", degrees)
    outputs = []
    for _ in range(5):
        outputs.append(module(**example))
        dist.barrier()
        dist.all_reduce(torch.ones(1))
    return max(relative_error(materialize(output), model(**example)) for output in outputs)


class Fault:
    """What is wrong on rank 1 during a call: `around` it, with other `given`; it is undone afterwards."""

    def __init__(self, around: Around | None = None, given: Callable[[Example], Example] | None = None) -> None:
        self.around, self.given = around or (lambda *_: nullcontext()), given or (lambda example: example)


def _raising(error: BaseException) -> Around:
    @contextmanager
    def around(module: Any, model: Any) -> Iterator[None]:
        def bomb(*_: Any) -> None:
            raise error

        hooks = [body.module.register_forward_pre_hook(bomb) for body in _runner(module).bodies.values()]
        yield
        for hook in hooks:
            hook.remove()

    return around


@contextmanager
def _raising_in_an_exchange(module: Any, model: Any) -> Iterator[None]:
    def bomb(*_: Any, **__: Any) -> None:
        raise ConnectionError("injected")

    # Before anything is sent: with all that it waits for, the other would hear of it in its next call only.
    places = (
        (collectives, "start"),
        (collectives, "wait"),
        (wire, "wait"),
        (DirectSend, "forward"),
        (Channels, "send"),
    )
    with ExitStack() as patched:
        for place, name in places:
            patched.enter_context(mock.patch.object(place, name, bomb))
        yield


@contextmanager
def _traced_anew_in_vain(module: Any, model: Any) -> Iterator[None]:
    def bomb(*_: Any) -> None:
        raise LookupError("injected")

    hook = next(model.children()).register_forward_pre_hook(bomb)
    yield
    hook.remove()


@contextmanager
def _training(module: Any, model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


@contextmanager
def _hooked(module: Any, model: Any) -> Iterator[None]:
    hook = next(model.children()).register_forward_hook(lambda *args: args[-1] * 2)
    yield
    hook.remove()


@contextmanager
def _precise(module: Any, model: Any) -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


FAULTS: dict[str, Fault] = {
    "raises in a layer": Fault(_raising(ArithmeticError("injected"))),
    "is interrupted": Fault(_raising(KeyboardInterrupt())),
    "exits in a layer": Fault(_raising(SystemExit(3))),
    "has no memory": Fault(_raising(torch.OutOfMemoryError("injected"))),
    "raises in an exchange": Fault(_raising_in_an_exchange),
    "raises in a trace": Fault(_traced_anew_in_vain),
    "cannot bind": Fault(given=lambda one: {"x": one["x"]}),
    "another shape": Fault(given=lambda one: one | {"x": one["x"][:, :, :-2]}),
    "another dtype": Fault(given=lambda one: one | {"t": one["t"].double()}),
    "training": Fault(_training),
    "a hook": Fault(_hooked),
    "a setting": Fault(_precise),
    "autocast": Fault(lambda *_: torch.autocast("cpu", torch.bfloat16)),
}


def failing(degrees: Degrees) -> dict[str, dict[str, Any]]:
    """For each fault what this rank's call raises, and how right it is afterwards."""
    module, model, example = _made("port", degrees, timeout=20)
    _error(module, model, example)
    found = {}
    for name, fault in FAULTS.items():
        with fault.around(module, model) if _rank() else nullcontext():
            given = fault.given(example) if _rank() else example
            found[name] = _failure(lambda given=given: _call(module, given))
        found[name]["afterwards"] = _error(module, model, example)
    return found


@torch.no_grad()
def _call(module: Any, example: Example) -> None:
    try:
        materialize(module(**example))
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(type(error).__name__) from error

"""What forward asks PyTorch, and what is around a call: `port` gives what the model gives in that mode, or refuses."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import xdit_ir as xir

X = torch.randn(2, 3, 4)


class Model(nn.Module):
    """A layer, and a factor that `ask(*arguments)` gives."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.__dict__["ask"] = nn.Linear(4, 4), ask

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * self.ask(*more)
        return result


def made(ask: Callable[..., Any]) -> Model:
    torch.manual_seed(0)
    return Model(ask).eval().requires_grad_(False)


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


Around = Callable[[], AbstractContextManager[Any]]
matmul = torch.backends.cuda.matmul
# What is around some of the calls, and what forward asks.
MODES: dict[str, tuple[Around, Callable[[], Any]]] = {
    "gradients": (torch.enable_grad, lambda: 1 + torch.is_grad_enabled()),
    "inference mode": (torch.inference_mode, lambda: 1 + torch.is_inference_mode_enabled()),
    "kernels of attention": (
        lambda: sdpa_kernel(SDPBackend.MATH),
        lambda: 1 + torch.backends.cuda.flash_sdp_enabled(),
    ),
    "deterministic": (
        lambda: setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, value=True),
        lambda: 1 + torch.are_deterministic_algorithms_enabled(),
    ),
    "precision": (
        lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
        lambda: len(torch.get_float32_matmul_precision()),
    ),
    "an attribute": (
        lambda: setting(lambda: matmul.allow_tf32, functools.partial(setattr, matmul, "allow_tf32"), value=True),
        lambda: 1 + matmul.allow_tf32,
    ),
    "autocast elsewhere": (
        lambda: setting(
            lambda: torch.is_autocast_enabled("cuda"), functools.partial(torch.set_autocast_enabled, "cuda"), value=True
        ),
        lambda: 1 + torch.is_autocast_enabled("cuda"),
    ),
    "the seed": (lambda: setting(torch.initial_seed, torch.manual_seed, 5), lambda: torch.initial_seed() % 7),
}


@pytest.mark.parametrize("name", MODES)
def test_what_forward_asks_is_as_around_the_call(name: str) -> None:
    around, ask = MODES[name]
    model = made(ask)
    ported = xir.port(model)
    for changed in (False, True, False):
        with torch.no_grad(), around() if changed else torch.no_grad():
            torch.testing.assert_close(ported(X), model(X))
    assert len(ported.programs) in (2, 3), "one for each mode (what was set back may differ from what was never set)"


def test_a_program_of_emit_is_told_of_no_mode() -> None:
    model = made(lambda: 1 + torch.is_grad_enabled() + torch.is_inference_mode_enabled())
    with torch.enable_grad():
        program = xir.trace(model, (X,))
        [out] = program.parallelize().simulate(model, (X,))
    torch.testing.assert_close(out, model.linear(X))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


def test_a_mode_of_functions_is_refused_and_forgotten() -> None:
    model = made(lambda: 1)
    ported = xir.port(model)
    assert torch.equal(ported(X), model(X))
    with Doubling(), pytest.raises(xir.TraceError, match="under a TorchFunctionMode, Doubling"):
        ported(X)
    with torch.device("cpu"):
        assert torch.equal(ported(X), model(X))


def test_a_method_of_tensors_that_somebody_replaces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(lambda: torch.ones(4).cumsum(0).roll(1))
    ported = xir.port(model)
    assert torch.equal(ported(X), model(X))
    old = torch.Tensor.cumsum
    with monkeypatch.context() as patch, pytest.raises(xir.TraceError, match=r"a method of torch\.Tensor"):
        patch.setattr(torch.Tensor, "cumsum", lambda x, dim: old(x, dim) * 2)
        ported(X)
    assert torch.equal(ported(X), model(X)) and len(ported.programs) == 1


@pytest.mark.parametrize("seed", [lambda: torch.manual_seed(3) and 1, lambda: torch.random.seed() and 1])
def test_seeding_is_refused(seed: Callable[[], Any]) -> None:
    ported = xir.port(made(seed))
    before = torch.get_rng_state()
    with pytest.raises(xir.TraceError, match="forward seeds random numbers"):
        ported(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_tensor_for_two_arguments() -> None:
    model = made(lambda left, right: 2 if left is right else 3)
    for first in (True, False):
        ported, one, other = xir.port(model), torch.ones(1), torch.ones(1)
        for same in (first, not first, first):
            given = (one, one if same else other)
            assert torch.equal(ported(X, *given), model(X, *given))


@pytest.mark.parametrize("argument", [False, True])
def test_minus_zero_is_no_zero(*, argument: bool) -> None:
    sign = lambda number: torch.tensor(number).signbit().item() + 1  # noqa: E731
    model = made(sign if argument else lambda: sign(model.factor))
    ported = xir.port(model)
    for number in (0.0, -0.0, float("nan"), 0.0):
        model.factor = number
        given = (number,) if argument else ()
        assert torch.equal(ported(X, *given), model(X, *given))


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.Tensor.mul else result


def test_a_tensor_with_operators_of_its_own_is_refused_wherever_it_is() -> None:
    table = {"odd": torch.ones(4).as_subclass(Odd)}
    model = made(lambda: table["odd"])
    model.table = table
    with pytest.raises(xir.TraceError, match="Odd, which is no plain tensor"):
        xir.port(model)(X)


def test_modules_that_cannot_be_looked_into_are_refused_by_port() -> None:
    script = made(lambda: 1)
    script.linear = torch.jit.trace(nn.Linear(4, 4), (X,))
    with pytest.raises(xir.ParallelizeError, match="linear is a ScriptModule"):
        xir.port(script)
    packed = made(lambda: 1)
    packed.linear.packed = torch.ops.quantized.linear_prepack_fp16(packed.linear.weight, packed.linear.bias)
    with pytest.raises(xir.ParallelizeError, match=r"linear\.packed is packed"):
        xir.port(packed)


def test_threads_call_a_port_one_after_the_other() -> None:
    model, results = made(lambda: 1), dict[int, Any]()
    ported = xir.port(model)

    def call(rows: int) -> None:
        with torch.no_grad():
            results[rows] = ported(X[:, :rows])

    threads = [threading.Thread(target=call, args=(rows,)) for rows in (1, 2, 3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for rows in (1, 2, 3):
        torch.testing.assert_close(results[rows], model(X[:, :rows]))


def test_what_an_lru_cache_of_a_closure_got_is_no_tensor_of_a_trace() -> None:
    table = functools.lru_cache(lambda size: torch.arange(float(size)))
    model = made(lambda: table(4))
    assert torch.equal(xir.port(model)(X), model(X))
    assert torch.equal(table(4).mul_(2), torch.arange(4.0) * 2)

"""Tracing leaves the model as it was, allocates nothing, and fails with the model's own line."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xdit_ir import models
from xdit_ir.capture import trace
from xdit_ir.capture.values import KNOWN_NUMEL
from xdit_ir.errors import TraceError
from xdit_ir.ir.program import Program

Check = Callable[..., Program]
X = (torch.randn(2, 4),)


@functools.lru_cache
def table(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32)


class Lazy(nn.Module):
    """Fills caches of all kinds at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.cache: Any = None
        self.tables: dict[int, Any] = {}
        self.fixed = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        if self.cache is None:
            self.cache = torch.ones(size)
        if size not in self.tables:
            self.tables[size] = torch.arange(size) * 2
        return self.linear(x) * self.cache + self.tables[size] + table(size) + self.fixed[:4]


def snapshot(model: nn.Module) -> Any:
    state = {
        name: (id(item), getattr(item, "_version", None)) for name, item in model.state_dict(keep_vars=True).items()
    }
    plain = {
        (path, name): (id(item), repr(item) if isinstance(item, (dict, list)) else None)
        for path, module in model.named_modules()
        for name, item in vars(module).items()
        if name not in ("_modules", "_parameters", "_buffers")
    }
    return state, plain, {path: (id(module), type(module)) for path, module in model.named_modules()}


def live_fakes() -> int:
    gc.collect()
    return sum(isinstance(item, FakeTensor) for item in gc.get_objects() if type(item) is FakeTensor)


@pytest.mark.parametrize("name", ["flux.1-dev", "qwen-image", "latte-1"])
def test_zoo_models_stay_as_they_were(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    before = snapshot(model)
    trace(model, example)
    assert snapshot(model) == before


def test_caches_stay_empty(check: Check) -> None:
    model = Lazy()
    before = snapshot(model)
    program = trace(model, X)
    assert snapshot(model) == before
    assert table.cache_info().currsize == 0
    assert isinstance(model(*X), torch.Tensor)
    check(model, X)
    assert type(table(4)) is torch.Tensor
    assert program.constants


def test_filled_caches_are_used(check: Check) -> None:
    model = Lazy()
    model(*X)
    check(model, X)


def test_nothing_is_left_behind() -> None:
    before = live_fakes()
    program = trace(Lazy(), X)
    with pytest.raises(TraceError, match="ValueError: no"):
        trace(Raises(), X)
    assert live_fakes() == before
    assert program


class Raises(Lazy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        super().forward(x)
        raise ValueError("no")


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 4)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_errors_of_the_model_are_chained() -> None:
    model = Fails()
    before = snapshot(model)
    with pytest.raises(TraceError, match=r"test_unchanged.py:\d+: x = layer\(x\): RuntimeError: ") as info:
        trace(model, X)
    assert isinstance(info.value.__cause__, RuntimeError)
    assert snapshot(model) == before


def test_active_dropout_is_refused() -> None:
    class Drops(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.drop = nn.Dropout(p)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(x) * 2

    with pytest.raises(TraceError, match=r"call \.eval\(\)"):
        trace(Drops(0.1), X)
    assert trace(Drops(0.0), X)
    assert trace(Drops(0.1).eval(), X)


def test_training_mode_without_dropout_is_fine(check: Check) -> None:
    model, example = models.load("flux.1-dev:tiny")
    check(model.train(), example)
    assert model.training


def test_outside_contexts_do_not_matter(check: Check) -> None:
    model = nn.Linear(4, 4)
    with torch.enable_grad():
        program = check(model, X)
    with torch.inference_mode():
        check(model, X)
    assert not any(item.is_inference() for item in program.constants.values())


def test_context_inside(check: Check) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
                y = self.linear(x)
            return y.float() + self.linear(x)

    program = check(Casts(), X)
    assert sum("linear" in str(node.target) for node in program.graph.nodes if node.op == "call_function") == 2
    assert len(trace(Casts().to("meta"), (X[0].to("meta"),)).graph.nodes) == len(program.graph.nodes)


def test_huge_models_allocate_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(1 << 20, 1 << 20), nn.SiLU()) for _ in range(3)))
    program = trace(model, (torch.empty(1 << 20, 1 << 20, device="meta"),))
    assert len(list(program.calls)) == 3


def test_buffers_of_a_hollow_model_may_be_on_a_gpu_already() -> None:
    """Weights come from a checkpoint, but `.to("cuda")` has moved the tables that it does not hold."""
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with FakeTensorMode():  # a GPU that need not be there; too large to be read
        model.table = nn.Buffer(torch.empty(2 * KNOWN_NUMEL, 4, device="cuda"), persistent=False)
    model.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x + self.table), model)  # type: ignore[method-assign]
    program = trace(model, (torch.empty(2 * KNOWN_NUMEL, 4),))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == [
        "aten.add.Tensor",
        "aten.linear.default",
    ]


def test_random_numbers_stay_random(run: Callable[..., Any]) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x).mul_(2) + torch.rand(4)

    model = Noisy()
    program = trace(model, X)
    torch.manual_seed(3)
    found = run(program, model, *X)
    torch.manual_seed(3)
    assert torch.equal(found, model(*X))


DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "like": torch.randn_like,
    "into a new one": lambda x: torch.empty_like(x).normal_(),
    "uniform": torch.rand_like,
    "by probabilities": lambda x: torch.zeros_like(x).bernoulli_(0.5),
}


@pytest.mark.parametrize("draw", list(DRAWS.values()), ids=list(DRAWS))
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_random_numbers_are_drawn_in_the_order_of_memory(
    draw: Callable[[torch.Tensor], torch.Tensor], order: tuple[int, ...], run: Callable[..., Any]
) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x + 1).permute(order) * 2  # which a program may have otherwise in memory
            return x + draw(x)

    model, x = nn.Sequential(nn.Linear(8, 8), Noisy()), torch.rand(3, 5, 8)
    program = trace(model, (x,))
    torch.manual_seed(3)
    found = run(program, model, x.mT.contiguous().mT)
    torch.manual_seed(3)
    torch.testing.assert_close(found, model(x))


def test_random_numbers_for_a_part_of_a_tensor(run: Callable[..., Any]) -> None:
    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[:, 1:4].normal_()
            return x + y

    model, x = nn.Sequential(nn.Linear(8, 8), Part()), torch.randn(2, 5, 8)
    program = trace(model, (x,))
    torch.manual_seed(3)
    found = run(program, model, x)
    torch.manual_seed(3)
    assert torch.equal(found, model(x))


def test_patched_forwards_and_hooks(check: Check) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    first, second, third = model
    plain = first.forward
    first.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    second.forward = functools.partial(type(second).forward, second)  # type: ignore[method-assign]
    third.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(model, X)


GLOBAL = torch.arange(4.0)
OTHER = nn.Linear(4, 4)


def test_tensors_from_anywhere(check: Check) -> None:
    """Globals, closures, containers and modules that the model does not own."""
    closed = torch.randn(4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {"a": [torch.randn(4), (torch.randn(4),)]}
            self.__dict__["hidden"] = nn.Linear(4, 4)
            self.linear = nn.Linear(4, 4)
            self.__dict__["same"] = self.linear.weight
            self.act = self.helper

        def helper(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.kept["a"][0][:4].view(4) + self.kept["a"][1][0][None, :]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(x) + GLOBAL[:4].view(1, 4) * closed.unsqueeze(0)
            x = OTHER(x) + self.hidden(x) + self.linear(x) @ self.same
            x[:, GLOBAL.long()] += 1
            return x * GLOBAL.sum().item()

    model = Model()
    program = check(model, X)
    assert set(program.state) == {"linear.weight", "linear.bias"}
    replaced = {name: torch.randn_like(item) for name, item in model.state_dict().items()}
    model.load_state_dict(replaced)
    check(model, X)


def test_tables_on_meta(run: Callable[..., Any]) -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(4.0)
            self.tables = {"a": [torch.randn(4), torch.randn(4)], "b": (torch.randn(4),)}
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.table + self.tables["a"][1] * self.tables["b"][0]

    with torch.device("meta"):
        program = trace(Tables(), X)
    assert set(program.state) == {"linear.weight", "linear.bias", "table", "tables.a.1", "tables.b.0"}
    model = Tables()
    with torch.no_grad():
        assert torch.equal(run(program, model, *X), model(*X))


MADE_BY_EXEC = """
from types import FunctionType
from torch import nn

class Layer(nn.Linear):
    kind = FunctionType
"""


@pytest.mark.parametrize("imported", [True, False])
def test_code_that_was_executed_not_imported(imported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As notebooks and loaders of remote code make it; and a module that holds the class of functions."""
    code = types.ModuleType("made_by_exec")
    if imported:
        monkeypatch.setitem(sys.modules, "made_by_exec", code)
    exec(MADE_BY_EXEC, code.__dict__)
    layer = code.Layer(4, 4)
    graph = trace(layer, (torch.randn(2, 4),)).graph
    assert any(node.target is torch.ops.aten.linear.default for node in graph.nodes)

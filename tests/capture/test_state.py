"""Python state that forward writes: tables that are filled once stay right, anything else is refused by name, and
nothing of a trace stays in the caller's objects."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import xdit_ir as xir

LOG: list[Any] = [0]
TABLES: dict[int, torch.Tensor] = {}
TOTAL = torch.zeros(1)
COUNT = 0
X = torch.randn(2, 4)


class Holder:
    def __init__(self) -> None:
        self.count = 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Named(dict[str, int]):
    pass


class Model(nn.Module):
    """Two layers, between which `write(self, x)` is called; its result is a factor if it is a number or tensor."""

    seen = 0

    def __init__(self, write: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.__dict__["write"] = write
        self.count, self.kept, self.first = 0, None, True
        self.tables: dict[Any, Any] = {}
        self.recent: deque[Any] = deque(maxlen=2)
        self.holder, self.slotted, self.named = Holder(), Slotted(), Named(count=0)
        self.array, self.raw = np.zeros(2), bytearray(2)
        self.counter, self.numbers = itertools.count(1), (number for number in range(9))
        self.register_buffer("buffer", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.write(self, self.layers[0](x))
        return self.layers[1](x) * (1 if found is None else found)


def put(target: Any, name: str, value: Any) -> None:
    setattr(target, name, value)


def count_global(model: Model, x: torch.Tensor) -> int:
    global COUNT
    COUNT += 1
    return COUNT


def in_a_closure() -> Callable[..., Any]:
    calls = 0

    def write(model: Model, x: torch.Tensor) -> int:
        nonlocal calls
        calls += 1
        return calls

    return write


def first_differs(model: Model, x: torch.Tensor) -> float:
    if model.first:
        model.first = False
        return 2.0
    return 1.0


# How forward keeps a state, and what the refusal calls it.
STATES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "attribute": (lambda m, x: put(m, "count", m.count + 1), "count"),
    "class attribute": (lambda m, x: put(type(m), "seen", type(m).seen + 1), "Model.seen"),
    "new attribute": (lambda m, x: put(m, "fresh", getattr(m, "fresh", 0) + 1), "fresh"),
    "residual": (lambda m, x: (m.kept, put(m, "kept", x))[0], "kept"),
    "object": (lambda m, x: put(m.holder, "count", m.holder.count + 1), "holder.count"),
    "slots": (lambda m, x: put(m.slotted, "count", m.slotted.count + 1), "slotted.count"),
    "dict": (lambda m, x: m.tables.update(calls=m.tables.get("calls", 0) + 1), "tables"),
    "dict subclass": (lambda m, x: m.named.update(count=m.named["count"] + 1), "named"),
    "deque": (lambda m, x: m.recent.append(1), "recent"),
    "array": (lambda m, x: m.array.__iadd__(1).sum() * 0, "array"),
    "bytearray": (lambda m, x: m.raw.append(1), "raw"),
    "global list": (lambda m, x: LOG.append(x), "LOG"),
    "global number": (count_global, "COUNT"),
    "global tensor": (lambda m, x: TOTAL.add_(1), "TOTAL"),
    "closure": (in_a_closure(), "calls in the closure of in_a_closure"),
    "iterator": (lambda m, x: next(m.counter), "count"),
    "generator": (lambda m, x: next(m.numbers), "generator"),
    "once": (first_differs, "first"),
    "random numbers": (lambda m, x: random.random(), "random numbers of Python"),
}


def fakes_in(model: Model) -> Iterator[Any]:
    held = [LOG, TABLES, TOTAL, *vars(model).values(), *vars(Model).values(), vars(model.holder), model.slotted.count]
    return (item for item in torch.utils._pytree.tree_leaves(held) if isinstance(item, FakeTensor))


def state_of(model: Model) -> str:
    plain = (model.count, model.kept, model.first, model.tables, model.recent, model.named, model.raw, model.seen)
    return repr((plain, model.holder.count, model.slotted.count, model.array, LOG, COUNT, TOTAL, model.counter))


@pytest.mark.parametrize("kind", STATES)
def test_a_state_is_refused_by_name_and_left_as_it_was(kind: str) -> None:
    write, name = STATES[kind]
    model = Model(write).eval()
    before, drawn = state_of(model), random.getstate()
    for _ in range(2):
        with pytest.raises(xir.TraceError) as refused:
            xir.trace(model, (X,))
        assert name in str(refused.value)
        assert ("keeps a state" in str(refused.value)) or ("random" in kind) or ("writes to" in str(refused.value))
    assert state_of(model) == before and random.getstate() == drawn and not list(fakes_in(model))


def cached(model: Model, x: torch.Tensor) -> torch.Tensor:
    """What a step cache does: every second call uses what the one before has computed."""
    if model.count % 2 == 0:
        model.kept = x.softmax(-1)
    model.count += 1
    kept: torch.Tensor = model.kept  # type: ignore[assignment]
    return kept


@pytest.mark.parametrize("name", ["cached", "attribute", "residual", "dict", "deque", "object", "once"])
def test_one_process_runs_a_model_with_a_state_as_it_is(name: str) -> None:
    write = cached if name == "cached" else STATES[name][0]
    torch.manual_seed(0)
    model, other = Model(write).eval(), Model(write).eval()
    other.load_state_dict(model.state_dict())
    ported = xir.port(model)
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="one process runs the model itself, until `reset`"),
    ):
        for _ in range(4):
            x = torch.randn(2, 4)
            assert torch.equal(ported(x), other(x))
    assert model.count == other.count and len(model.recent) == len(other.recent) and not ported.programs
    with pytest.raises(xir.ParallelizeError, match="ran whole on every rank: forward keeps a state"):
        ported.report()


def table(model: Model, x: torch.Tensor) -> torch.Tensor:
    if model.kept is None:
        model.kept = torch.arange(4.0)
    return model.kept


def table_by_size(model: Model, x: torch.Tensor) -> torch.Tensor:
    return model.tables.setdefault(x.shape[-1], (torch.arange(4.0), "made"))[0]


def table_in_a_buffer(model: Model, x: torch.Tensor) -> torch.Tensor:
    if model.buffer is None:
        model.buffer = torch.arange(4.0)
    return model.buffer


def global_table(model: Model, x: torch.Tensor) -> torch.Tensor:
    if 4 not in TABLES:
        TABLES[4] = torch.arange(4.0)
    return TABLES[4]


def made_anew(model: Model, x: torch.Tensor) -> torch.Tensor:
    model.kept = torch.arange(4.0)
    return model.kept


def large(model: Model, x: torch.Tensor) -> torch.Tensor:
    if model.kept is None:
        model.kept = torch.arange(1.0 + (1 << 20))
    return model.kept[:4]


def first_size(model: Model, x: torch.Tensor) -> int:
    """What the first call saw decides later ones."""
    if model.count == 0:
        model.count = len(x)
    return model.count


@pytest.mark.parametrize("fill", [table, table_by_size, table_in_a_buffer, global_table, made_anew, large, first_size])
def test_what_is_filled_once_is_right_and_left_in_the_model(fill: Callable[..., Any]) -> None:
    TABLES.clear()
    torch.manual_seed(0)
    model, other = Model(fill).eval(), Model(fill).eval()
    other.load_state_dict(model.state_dict())
    ported = xir.port(model)
    with torch.no_grad():
        for rows in (2, 3, 2, 2):
            x = torch.randn(rows, 4)
            assert torch.equal(ported(x), other(x))
    assert len(ported.programs) == 2 and not list(fakes_in(model))


def test_a_trace_alone_leaves_no_table_in_the_model() -> None:
    model = Model(table).eval()
    traced = xir.trace(model, (X,))
    assert model.kept is None
    assert torch.equal(traced.parallelize().simulate(model, (X,))[0], model(X).detach())


@pytest.mark.parametrize("place", ["a block", "the model"])
def test_a_hook_that_collects_is_refused(place: str) -> None:
    model, found = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))).eval(), []
    where = model[1] if place == "a block" else model
    handle = where.register_forward_hook(lambda module, args, output: found.append(output))
    with pytest.raises(xir.TraceError, match=r"keeps a state .*'found in the closure of"):
        xir.trace(model, (X,))
    assert not found
    with torch.no_grad(), pytest.warns(UserWarning, match="one process runs the model itself"):
        got = xir.port(model)(X)
    handle.remove()
    assert torch.equal(got, model(X).detach()) and len(found) == 1


def test_a_failed_trace_leaves_nothing() -> None:
    def write(model: Model, x: torch.Tensor) -> None:
        LOG.append(x)
        TABLES[7] = x
        raise ValueError("no")

    before = len(LOG)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            xir.port(Model(write).eval())(X)
    assert len(LOG) == before and 7 not in TABLES


class Tables(nn.Module):
    """Buffers that forward writes into: `fill` does."""

    def __init__(self, fill: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.linear, self.__dict__["fill"] = nn.Linear(4, 4), fill
        self.register_buffer("table", torch.zeros(8, 4), persistent=False)
        self.plain, self.filled = torch.zeros(8, 4), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fill(self)
        result: torch.Tensor = self.linear(x) + self.table[: len(x)] + self.plain[: len(x)]
        return result


def fill_once(model: Any) -> None:
    if not model.filled:
        model.table[:2] = torch.arange(8.0).view(2, 4)
        model.table.mul_(2)
        model.filled = True


def fill_always(model: Any) -> None:
    model.plain[:2] = torch.arange(8.0).view(2, 4)
    model.plain[2:].fill_(3)


def count_up(model: Any) -> None:
    model.table.add_(1)


@pytest.mark.parametrize("fill", [fill_once, fill_always])
def test_tables_that_forward_fills_in_place(fill: Callable[[Any], None]) -> None:
    model, untouched = Tables(fill).eval(), Tables(fill).eval()
    untouched.load_state_dict(model.state_dict())
    traced = xir.trace(model, (X,))
    assert not model.table.any() and not model.plain.any() and not model.filled, "the model is left as it was"
    with torch.no_grad():
        want = untouched(X)
        assert torch.equal(traced.parallelize(cfg=1).simulate(model, (X,))[0], want)
        ported = xir.port(model)
        assert torch.equal(ported(X), want) and torch.equal(ported(X), want)


def test_a_buffer_that_counts_is_a_state() -> None:
    with pytest.raises(xir.TraceError, match="keeps a state between calls, writing 'table'"):
        xir.trace(Tables(count_up).eval(), (X,))


class Scaled(nn.Module):
    """Makes an attribute of a weight at every call, before it is read or after, as hooks of layers do."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.weight_g, self.before = nn.Parameter(torch.ones(4)), before
        self.weight = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before:
            self.weight = 2 * self.weight_g
        result = x * self.weight
        self.weight = 2 * self.weight_g
        return result


def test_what_is_made_of_weights_before_it_is_read_is_no_state() -> None:
    model, x = Scaled(before=True).eval(), torch.randn(3, 4)
    held = model.weight
    program = xir.trace(model, (x,))
    assert model.weight is held
    with torch.no_grad():
        torch.testing.assert_close(program.parallelize(ulysses=2).simulate(model, (x,))[0], 2 * x)


def test_what_is_read_before_it_is_made_of_weights_is_a_state() -> None:
    with pytest.raises(xir.TraceError, match=r"'weight', which is computed from the model's parameters"):
        xir.trace(Scaled(before=False).eval(), (torch.randn(3, 4),))

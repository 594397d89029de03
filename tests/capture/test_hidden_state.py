"""State that forward keeps where no attribute shows it: refused by name, and put back."""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import copy
import ctypes
import enum
import io
import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xdit_ir.capture import trace
from xdit_ir.capture.binder import bind_inputs
from xdit_ir.errors import MismatchError, TraceError

X = torch.arange(6.0).reshape(2, 3)


class Keeps(nn.Module):
    """A layer that does something to what it holds, and multiplies by what comes of it."""

    def __init__(self, held: Any, use: Callable[[Any], float]) -> None:
        super().__init__()
        self.linear, self.held, self.use = nn.Linear(3, 3), held, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.use(self.held)


def counted(held: Any) -> float:
    held.n = getattr(held, "n", 0) + 1
    return float(held.n)


def appended(held: Any) -> float:
    held.append(1)
    return float(len(held))


def entered(held: Any) -> float:
    held["n"] = held.get("n", 0) + 1
    return float(held["n"])


def first(held: Any) -> float:
    held[0] += 1
    return float(held[0])


class Counted:
    """Of which the class counts, with an attribute that it does not have yet."""


class Hides:
    """Counts where it says that there is nothing."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            return {}
        return object.__getattribute__(self, name)


class Derived(Counted):
    pass


class Text(str):
    n: int


class Member(enum.IntEnum):
    ONE = 1


class Open(dict[str, Any]):
    __getattr__ = dict.get


def in_context(held: contextvars.ContextVar[int]) -> float:
    held.set(held.get() + 1)
    return float(held.get())


def of_class(held: Any) -> float:
    return counted(type(held))


def of_function(held: Any) -> float:
    return counted(of_function)


def written(held: io.BytesIO) -> float:
    held.write(b"a")
    return float(held.tell())


def put(held: queue.SimpleQueue[int]) -> float:
    held.put(1)
    return float(held.qsize())


def of_ctypes(held: Any) -> float:
    held.value += 1
    return float(held.value)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "thread local": (threading.local, counted),
    "class": (Counted, of_class),
    "function": (object, of_function),
    "array": (lambda: array.array("d"), appended),
    "ordered dict": (collections.OrderedDict, entered),
    "memory view": (lambda: memoryview(bytearray(1)), first),
    "objects in an array": (lambda: np.array([0], dtype=object), first),
    "file in memory": (io.BytesIO, written),
    "queue": (queue.SimpleQueue, put),
    "number of C": (lambda: ctypes.c_int(0), of_ctypes),
    "random numbers": (lambda: random.Random(0), lambda held: held.random()),
    "random numbers of NumPy": (lambda: np.random.default_rng(0), lambda held: float(held.normal())),
    "old random numbers of NumPy": (lambda: np.random.RandomState(0), lambda held: float(held.normal())),
    "method of C": (lambda: iter([1.0, 2.0]).__next__, lambda held: held()),
    "object of the standard library": (argparse.Namespace, counted),
    "semaphore": (lambda: threading.Semaphore(9), lambda held: held.acquire() * float(held._value)),
    "text with an attribute": (lambda: Text("a"), counted),
    "member of an enumeration": (lambda: Member.ONE, counted),
    "masked array": (lambda: np.ma.masked_array([0.0, 1.0], mask=[False, True]), first),
    "context variable": (lambda: contextvars.ContextVar("n", default=0), in_context),
    "attribute with a name in a text": (Counted, lambda held: entered(held.__dict__)),
    "base of a class": (lambda: Derived, lambda held: counted(held.__mro__[1])),
    "any attribute": (Open, entered),
    "attributes that are not shown": (Hides, counted),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_state_is_refused(kind: str) -> None:
    make, use = KINDS[kind]
    with pytest.raises(TraceError, match="keeps a state between calls"):
        trace(Keeps(make(), use), (X,))


@pytest.mark.parametrize(
    "kind",
    [
        *("array", "number of C", "file in memory", "random numbers", "random numbers of NumPy"),
        *("semaphore", "masked array", "context variable"),
    ],
)
def test_what_a_trace_did_is_put_back(kind: str) -> None:
    make, use = KINDS[kind]
    held = make()
    with pytest.raises(TraceError):
        trace(Keeps(held, use), (X,))
    assert use(held) == use(make())


def test_classes_and_functions_keep_nothing_of_a_trace() -> None:
    for kind in ("class", "function"):
        make, use = KINDS[kind]
        with pytest.raises(TraceError):
            trace(Keeps(make(), use), (X,))
    assert not hasattr(Counted, "n") and not hasattr(of_function, "n")


def test_numbers_of_a_generator_are_refused() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(3, generator=self.generator)

    with pytest.raises(TraceError, match=r"torch\.Generator"):
        trace(Draws(), (X,))


def test_a_generator_that_forward_is_given_and_leaves_alone_may_be_any() -> None:
    class Ignores(nn.Module):
        def forward(self, x: torch.Tensor, generator: Any = None) -> torch.Tensor:
            return x * (2 if generator is None or generator.device.type == "cpu" else 3)

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    program = trace(Ignores(), {"x": X, "generator": generators[0]})
    generators[0].manual_seed(2)
    for generator in generators:
        [given_x] = bind_inputs(Ignores(), program, (X, generator), {})
        assert given_x is X
    with pytest.raises(MismatchError, match="generator"):
        bind_inputs(Ignores(), program, (X,), {})


@pytest.mark.parametrize("read", [lambda given: given.get_state(), lambda given: given.initial_seed(), copy.copy])
def test_what_depends_on_the_state_of_a_given_generator_is_refused(read: Callable[[torch.Generator], Any]) -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            read(generator)
            return x * 2

    class Draws(nn.Module):
        def forward(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return x * torch.rand(3, generator=generator)

    for model in (Reads(), Draws()):
        with pytest.raises(TraceError, match=r"torch\.Generator"):
            trace(model, (X, torch.Generator()))


@pytest.mark.parametrize("name", ["table", "x"])
def test_writes_through_numpy_are_refused(name: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (self.table if name == "table" else x).numpy()[0] += 1
            return x + self.table

    with pytest.raises(TraceError, match="through NumPy"):
        trace(Writes(), (torch.ones(3, dtype=torch.int64),))


def test_an_array_made_of_a_tensor_may_be_written() -> None:
    class Makes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = torch.arange(3).numpy()
            made += 1
            return x + torch.from_numpy(made)

    assert trace(Makes(), (X,)).constants

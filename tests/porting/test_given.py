"""What forward gets besides tensors, changed in place, and what it does with tensors themselves."""

from __future__ import annotations

import argparse
import array
import collections
import ctypes
import os
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.errors import TraceError

X = torch.arange(6.0).reshape(2, 3)
FACTOR = {"by": 1.0}
BY = 1.0


class Given(nn.Module):
    """Multiplies by what `use` makes of its second argument."""

    def __init__(self, use: Callable[[Any], float]) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        return x * self.use(given)


class Text(str):
    by: float


class Number(float):
    by: float


class Listed(list[Any]):
    by: float


class Mapped(dict[str, Any]):
    by: float


class Array(np.ndarray[Any, Any]):
    by: float


class Meta(type):
    by = 1.0


class OfMeta(metaclass=Meta):
    pass


class Open(dict[str, Any]):
    __getattr__ = dict.get


class OfClass:
    by = 1.0


def with_attribute(item: Any) -> Any:
    item.by = 1.0
    return item


def more(given: Any) -> None:
    given.by += 1.0


def more_global(given: Any) -> None:
    global BY
    BY += 1.0


def attribute(given: Any) -> float:
    return float(given.by)


def item(given: Any) -> float:
    return float(given[0])


def add(given: Any) -> None:
    given[0] += 1


def five(given: Any) -> None:
    given.value = 5


def turned(given: dict[str, float]) -> None:
    given["one"] = given.pop("one")


HELD = OfClass()
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], Any]]] = {
    "text with an attribute": (lambda: with_attribute(Text("a")), attribute, more),
    "number with an attribute": (lambda: with_attribute(Number(1)), attribute, more),
    "list with an attribute": (lambda: with_attribute(Listed()), attribute, more),
    "dict with an attribute": (lambda: with_attribute(Mapped()), attribute, more),
    "array with an attribute": (lambda: with_attribute(np.zeros(1).view(Array)), attribute, more),
    "class of an object": (OfClass, attribute, lambda given: setattr(OfClass, "by", OfClass.by + 1)),
    "class": (lambda: OfClass, attribute, more),
    "Python module": (lambda: with_attribute(types.ModuleType("given")), attribute, more),
    "global of a function": (lambda: lambda: BY, lambda given: given(), more_global),
    "array": (lambda: array.array("d", [1.0]), item, add),
    "memory view": (lambda: memoryview(bytearray(b"a")), item, add),
    "objects in an array": (lambda: np.array([1], dtype=object), item, add),
    "number of C": (
        lambda: ctypes.c_int(1),
        lambda given: float(given.value),
        lambda given: setattr(given, "value", 5),
    ),
    "object of the standard library": (lambda: argparse.Namespace(by=1.0), attribute, more),
    "class of a class": (lambda: OfMeta, lambda given: float(type(given).by), lambda given: more(type(given))),
    "any attribute": (lambda: Open(by=1.0), attribute, lambda given: given.update(by=2.0)),
    "weak reference": (lambda: weakref.ref(HELD), lambda given: float(given().by), lambda given: more(given())),
    "proxy": (lambda: types.MappingProxyType(FACTOR), lambda given: given["by"], lambda given: FACTOR.update(by=3.0)),
    "order": (lambda: {"one": 1.0, "two": 2.0}, lambda given: next(iter(given.values())), turned),
    "order in an ordered dict": (
        lambda: collections.OrderedDict(one=1.0, two=2.0),
        lambda given: next(iter(given.values())),
        lambda given: given.move_to_end("one"),
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_in_place_is_noticed(kind: str) -> None:
    make, use, change = CHANGES[kind]
    model, given = Given(use), make()
    ported = xir.port(model)
    for _ in range(3):
        assert torch.equal(ported(X, given), model(X, given))
        change(given)


@pytest.mark.parametrize("kind", ["object of the standard library", "text with an attribute", "class of a class"])
def test_so_is_one_of_what_the_model_holds(kind: str) -> None:
    make, use, change = CHANGES[kind]
    model = Given(lambda given: use(model.held))
    model.held = given = make()
    ported = xir.port(model)
    for _ in range(3):
        assert torch.equal(ported(X, None), model(X, None))
        change(given)


class Writes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * y


def test_arguments_are_written_as_forward_writes_them() -> None:
    ported, x = xir.port(Writes()), X.clone()
    for step in (1, 2):
        assert torch.equal(ported(x, X), (X + step) * X)
        assert torch.equal(x, X + step)


@pytest.mark.parametrize("first", ["apart", "shared"])
def test_arguments_in_the_same_memory_that_are_written_are_refused(first: str) -> None:
    ported, x = xir.port(Writes()), X.clone()
    if first == "apart":
        ported(X.clone(), X.clone())
    with pytest.raises(TraceError, match="x and y share memory"):
        ported(x, x.view(2, 3))
    assert torch.equal(x, X)


def test_how_tensors_lie_in_memory_is_noticed_where_forward_reads_it() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2 if x.is_contiguous() else 3)

    ported, turned = xir.port(Reads()), X.t().contiguous().t()
    for x, by in ((X, 2), (turned, 3), (X + 1, 2)):
        assert torch.equal(ported(x), x * by)
    assert len(ported.programs) == 2


def test_variables_of_the_environment_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the code names, and no others, which libraries set at their first use."""

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * int(os.environ.get("XDIT_TEST_FACTOR", "2"))

    ported = xir.port(Reads())
    for name, by in (("XDIT_TEST_OTHER", 2), ("XDIT_TEST_FACTOR", 3)):
        assert torch.equal(ported(X), X * 2)
        monkeypatch.setenv(name, "3")
        assert torch.equal(ported(X), X * by)
    assert len(ported.programs) == 2


def test_attributes_of_tensors_are_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * getattr(x, "by", 1)

    ported, x = xir.port(Reads()), X.clone()
    assert torch.equal(ported(x), x)
    x.by = 2  # type: ignore[attr-defined]
    with pytest.raises(TraceError, match=r"attributes of its own \(by\)"):
        ported(x)


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "set": lambda x: {x + 1},
    "slice": lambda x: slice(x + 1, None),
    "error": lambda x: ValueError(x + 1),
    "method": lambda x: (x + 1).sum,
    "container in itself": lambda x: (lambda made: (made.append(made), made)[1])([x + 1]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_no_tensor_of_the_trace_leaves_it(kind: str) -> None:
    class Returns(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return OUTPUTS[kind](x)

    with pytest.raises(TraceError):
        xir.port(Returns())(X)


def test_texts_of_tensors_are_those_of_the_model() -> None:
    class Returns(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return f"{x}"

    ported = xir.port(Returns())
    for x in (X, X + 1):
        assert ported(x) == f"{x}"


def test_weights_of_a_module_inside_an_object() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = types.SimpleNamespace(linear=nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.held.linear(x)  # type: ignore[no-any-return]

    model = Inside()
    ported = xir.port(model)
    with torch.no_grad():
        for change in (
            lambda weight: weight,
            lambda weight: weight.mul_(2),
            lambda weight: weight.data.mul_(2),
            lambda weight: setattr(model.held.linear, "weight", nn.Parameter(torch.ones(3, 3))),
        ):
            change(model.held.linear.weight)
            assert torch.equal(ported(X), model(X))

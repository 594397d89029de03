"""Code that asks which module or weight it has to do with: by `is`, by `id`, as a key, behind a weak reference."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir

X = torch.randn(2, 4)
ONE: Any = None
FACTORS: dict[Any, float] = {}
MEMO: dict[Any, torch.Tensor] = {}


class Mark:
    """A plain object."""


MARK = Mark()


class Layer(nn.Module):
    def __init__(self, factor: Callable[[nn.Module], float]) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 4), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear(x) * self.factor(self)
        return made


def layers(factor: Callable[[nn.Module], float] = lambda layer: 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(factor) for _ in range(3))).eval()


def held(model: nn.Sequential, item: Any, asks: Callable[[Any, Any], float]) -> nn.Sequential:
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: output * asks(item, module))
    return model


def of_globals(model: nn.Sequential) -> nn.Sequential:
    global ONE
    ONE = model[1]
    FACTORS[model[1]] = 2.0
    return model


def names(model: nn.Sequential) -> nn.Sequential:
    found = {module: name for name, module in model.named_modules()}
    return held(model, found, lambda found, module: 1.0 + int(found[module]))


def numbers(model: nn.Sequential) -> nn.Sequential:
    return held(model, {id(model[1]): 2.0}, lambda found, module: found.get(id(module), 1.0))


def weights(model: nn.Sequential) -> nn.Sequential:
    found = {model[1].linear.weight: 2.0}
    return held(model, found, lambda found, module: found.get(module.linear.weight, 1.0))


def weak(model: nn.Sequential) -> nn.Sequential:
    found = weakref.WeakKeyDictionary({model[1]: 2.0})
    return held(model, found, lambda found, module: found.get(module, 1.0))


def in_attributes(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        layer.chosen = {model[1]}
        layer.factor = lambda layer: 2.0 if layer in layer.chosen else 1.0
    return model


def marked(factor: Callable[[Any], float]) -> nn.Sequential:
    """Layers with marks, the second with the one that everybody knows."""
    model = layers(lambda layer: factor(layer.mark))
    for layer, mark in zip(model, (Mark(), MARK, Mark()), strict=True):
        layer.mark = mark
    FACTORS[MARK] = 2.0
    return model


WAYS = {
    "a known object": lambda: marked(lambda mark: 2.0 if mark is MARK else 1.0),
    "a known object as a key": lambda: marked(lambda mark: FACTORS.get(mark, 1.0)),
    "the number of a known object": lambda: marked(
        functools.partial(lambda known, x: known.get(id(x), 1), {id(MARK): 2})
    ),
    "global": lambda: of_globals(layers(lambda layer: 2.0 if layer is ONE else 1.0)),
    "key of a global": lambda: of_globals(layers(lambda layer: FACTORS.get(layer, 1.0))),
    "closure": lambda: held(model := layers(), model[1], lambda one, module: 2.0 if module is one else 1.0),
    "names of modules": lambda: names(layers()),
    "numbers of modules": lambda: numbers(layers()),
    "keys that are weights": lambda: weights(layers()),
    "weak keys": lambda: weak(layers()),
    "a set in an attribute": lambda: in_attributes(layers()),
    "pairs": lambda: held(m := layers(), [(m[1], 2.0)], lambda found, module: 2.0 if found[0][0] is module else 1.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_answers_for_its_original(way: str) -> None:
    model = WAYS[way]()
    known = dict(FACTORS)
    program = xir.trace(model, (X,))
    with torch.no_grad():
        torch.testing.assert_close(program.parallelize(cfg=2).simulate(model, (X,))[0], model(X))
    assert dict(FACTORS) == known and (ONE is None or type(ONE) is Layer), "what refers to the model does again"
    assert not any("_xdit" in name for module in model.modules() for name in vars(module))


def test_a_table_by_module_is_refused() -> None:
    def made(layer: nn.Module) -> Any:
        return MEMO.setdefault(layer, torch.arange(4.0))

    with pytest.raises(xir.TraceError, match=r"(?s)MEMO.*of a module of the model, by its identity"):
        xir.trace(layers(made), (X,))
    assert not MEMO


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        made: torch.Tensor = self.layer(x) * (given(x) if callable(given) else len(given))
        return made


@pytest.mark.parametrize("make", [lambda one: {one: 2.0}, lambda one: {id(one): X}, lambda one: frozenset([one])])
def test_arguments_that_refer_to_modules_are_refused(make: Callable[[nn.Module], Any]) -> None:
    model = Asks().eval()
    with pytest.raises(xir.TraceError, match=r"(?s)input 'given.* refers to a module or weight of the model"):
        xir.trace(model, {"x": X, "given": make(model.layer)})


def test_an_argument_that_counts_in_a_closure_is_refused() -> None:
    calls: list[int] = []

    def count(x: torch.Tensor) -> float:
        calls.append(1)
        return float(len(calls))

    with pytest.raises(xir.TraceError, match="keeps a state between calls, writing 'calls in the closure of"):
        xir.trace(Asks().eval(), {"x": X, "given": count})
    assert not calls


def test_addresses_of_tensors_are_refused() -> None:
    model = layers(lambda layer: float(layer.linear.weight.data_ptr() % 2))  # type: ignore[operator, union-attr]
    with pytest.raises(xir.TraceError, match=r"data_ptr\(\) is of the caller's memory"):
        xir.trace(model, (X,))

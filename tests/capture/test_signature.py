"""Inputs of any nesting, outputs of any type, and the messages of calls that do not fit."""

from __future__ import annotations

import functools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.capture import InputBinder, bind_inputs, trace
from xdit_ir.capture.effects import copied
from xdit_ir.errors import MismatchError, TraceError
from xdit_ir.ir.program import Program
from xdit_ir.simulation.examples import run_single

Check = Callable[..., Program]
Pair = namedtuple("Pair", "first second")
X = torch.randn(2, 3)


@dataclass
class Output:
    sample: torch.Tensor
    note: str = ""
    more: Any = None


@dataclass(frozen=True)
class Nested:
    inner: Output
    items: tuple[Any, ...]


class Returns(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x * self.weight, x, self.weight)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "tensor": lambda y, x, w: y,
    "tuple": lambda y, x, w: (y, y + 1),
    "list": lambda y, x, w: [y, [y + 1]],
    "dict": lambda y, x, w: {"b": y, "a": (y + 1, None, 3, "text")},
    "ordered dict": lambda y, x, w: OrderedDict(b=y, a=y),
    "namedtuple": lambda y, x, w: Pair(y, [y]),
    "dataclass": lambda y, x, w: Output(y, "note"),
    "nested dataclass": lambda y, x, w: {"k": Nested(Output(y, more=[Output(y + 1)]), (y, None))},
    "input": lambda y, x, w: (x, x, y),
    "parameter": lambda y, x, w: (w, y),
    "nothing": lambda y, x, w: None,
    "view": lambda y, x, w: (x.t(), y[0]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str, check: Check) -> None:
    check(Returns(OUTPUTS[name]), (X,), (torch.randn(2, 3),))


def test_diffusers_output(check: Check) -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    check(Returns(lambda y, x, w: Transformer2DModelOutput(sample=y)), (X,))


def test_an_object_with_tensors_is_refused() -> None:
    class Odd:
        """Made in a way that nobody else can know."""

        def __new__(cls, value: Any) -> Odd:
            made = object.__new__(cls)
            made.value = value  # type: ignore[attr-defined]
            return made

    with pytest.raises(TraceError, match="Odd"):
        trace(Returns(lambda y, x, w: Odd(y)), (X,))


class Takes(nn.Module):
    def forward(self, x: torch.Tensor, cond: Any = None, *rest: Any, scale: float = 1.0, **extra: Any) -> torch.Tensor:
        for item in (*(cond or {}).values(), *rest, *extra.values()):
            for tensor in item if isinstance(item, (list, tuple)) else [item]:
                x = x + tensor
        return x * scale


def example() -> tuple[Any, ...]:
    return (
        torch.randn(2, 3),
        {"b": torch.randn(3), "a": [torch.randn(3), torch.randn(1)]},
        torch.randn(2, 1),
    )


def test_inputs(check: Check) -> None:
    program = check(Takes(), example(), example())
    paths = [leaf.path for leaf in program.signature.leaves]
    assert paths == ["x", "cond.b", "cond.a[0]", "cond.a[1]", "rest[0]"]
    program = check(Takes(), {"x": X, "scale": 2.0, "z": X, "cond": None, "y": (X, X)})
    paths = [leaf.path for leaf in program.signature.leaves]
    assert paths == ["x", "cond", "scale", "z", "y[0]", "y[1]"]
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == ["x", "z", "y_0", "y_1"]


def test_way_of_passing_does_not_matter(run: Callable[..., Any]) -> None:
    model = Takes()
    x, cond = X.round(), {"b": torch.ones(3), "a": [torch.arange(3.0)]}
    program = trace(model, {"x": x, "cond": cond, "u": x, "v": x * 2})
    found = run(program, model, x, cond, u=x, v=x * 2)
    assert torch.equal(found, model(x, cond, u=x, v=x * 2))


def test_order_of_keys_matters() -> None:
    """As forward may go through them in this order."""
    cond = {"b": X, "a": [X]}
    program = trace(Takes(), {"x": X, "cond": cond})
    with pytest.raises(MismatchError, match=r"order of keys, expected x, cond.b, cond.a\[0\]"):
        bind_inputs(Takes(), program, (X, {"a": [X], "b": X}), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 4)}, r"^x: expected float32\[2, 3\], got float32\[2, 4\]"),
        ({"x": torch.randn(2, 3).half()}, r"^x: expected float32\[2, 3\], got float16\[2, 3\]"),
        ({"x": 3}, r"^x: expected float32\[2, 3\], got 3"),
        ({"scale": 3.0}, "^scale: expected 2.0, got 3.0"),
        ({"scale": X}, r"^scale: expected 2.0, got float32\[2, 3\]"),
        ({"cond": {"a": X}}, "missing cond.b; unexpected cond.a"),
        ({"cond": {"b": [X]}}, r"missing cond.b; unexpected cond.b\[0\]"),
        ({"other": X}, "unexpected other"),
    ],
)
def test_mismatch(change: dict[str, Any], message: str) -> None:
    call = {"x": X, "cond": {"b": X}, "scale": 2.0}
    program = trace(Takes(), call)
    assert len(bind_inputs(Takes(), program, (), call)) == 2
    with pytest.raises(MismatchError, match=message):
        bind_inputs(Takes(), program, (), {**call, **change})


def test_missing_and_surplus_arguments() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    program = trace(Model(), (X, X))
    with pytest.raises(MismatchError, match="missing a required argument: 'y'"):
        InputBinder(Model(), program)((X,), {})
    with pytest.raises(TraceError, match="missing a required argument: 'y'"):
        trace(Model(), {"x": X})
    with pytest.raises(TraceError, match="unexpected keyword argument 'z'"):
        trace(Model(), {"x": X, "y": X, "z": X})


def test_literals_compare_by_equality(check: Check) -> None:
    @dataclass
    class Options:
        factor: int

    class Model(nn.Module):
        def forward(self, x: torch.Tensor, options: Options) -> torch.Tensor:
            return x * options.factor

    program = check(Model(), (X, Options(3)), (X, Options(3)))
    with pytest.raises(MismatchError, match=r"^options: expected"):
        bind_inputs(Model(), program, (X, Options(4)), {})


class Cache:
    def __init__(self, value: Any = None) -> None:
        self.value = value


class Stores(nn.Module):
    def __init__(self, store: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.store = store

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        self.store(cache, x * 2)
        return x


def test_objects_with_tensors_are_followed(check: Check) -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            return x + cache.value["layers"][0].value * cache.value["scale"]

    def cache(scale: int) -> Cache:
        return Cache({"layers": [Cache(torch.randn(X.shape))], "scale": scale})

    program = check(Reads(), (X, cache(2)), (X, cache(2)))
    assert "cache.value.layers[0].value" in [leaf.path for leaf in program.signature.leaves]
    with pytest.raises(MismatchError, match=r"^cache.value.scale: expected 2, got 3"):
        bind_inputs(Reads(), program, (X, cache(3)), {})


@pytest.mark.parametrize(
    ("cache", "store"),
    [
        (Cache(), lambda cache, x: setattr(cache, "value", x)),
        (Cache(torch.zeros(2, 3)), lambda cache, x: setattr(cache, "value", x)),
        ({"k": None}, lambda cache, x: cache.update(k=x)),
        ([], lambda cache, x: cache.append(x)),
        ([torch.zeros(2, 3)], lambda cache, x: cache[0].copy_(x)),
    ],
)
def test_caches_are_filled_by_calls_only(cache: Any, store: Callable[[Any, torch.Tensor], Any]) -> None:
    model, given, expected = Stores(store), copied(cache), copied(cache)
    program = trace(model, (X, given))
    assert not _tensors(given) or torch.equal(_tensors(given)[0], torch.zeros(2, 3))
    model(X, expected)
    run_single(program, model, (X, given))
    assert [item.tolist() for item in _tensors(given)] == [item.tolist() for item in _tensors(expected)]
    assert _tensors(given)[0].any()


def test_taking_from_a_dict_is_fine() -> None:
    program = trace(Stores(lambda cache, x: cache.pop("scale")), (X, {"scale": 2}))
    assert len(program.signature.guards) == 1


def _tensors(cache: Any) -> list[Any]:
    held = vars(cache) if isinstance(cache, Cache) else cache
    return [item for item in (held.values() if isinstance(held, dict) else held) if item is not None]


class Looked(nn.Module):
    """Code around forward that looks for an argument among the keywords, or by its place."""

    def _around(function: Any) -> Any:  # type: ignore[misc]
        @functools.wraps(function)
        def around(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs) * kwargs.get("options", {}).get("scale", 1) * (10 if args else 1)

        return around

    @_around
    def forward(self, x: torch.Tensor, options: dict[str, float] | None = None) -> torch.Tensor:
        return x + 1


def test_arguments_are_passed_as_the_caller_passes_them() -> None:
    model, x, options = Looked(), torch.ones(2), {"scale": 3.0}
    named, placed = {"x": x, "options": options}, (x, options)
    assert torch.equal(run_single(trace(model, named), model, named), model(**named))
    assert torch.equal(run_single(trace(model, placed), model, placed), model(*placed))
    assert model(**named)[0] == 6 and model(*placed)[0] == 20

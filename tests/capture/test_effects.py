"""What forward leaves in caches, dicts and lists that it is given is there after the program ran, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.capture.effects import copied
from xdit_ir.simulation.examples import run_single


class LayerCache:
    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.calls = 0


class Cache:
    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.log: list[Any] = []
        self.old = "to be removed"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        q, k, v = (item.unflatten(-1, (4, 8)).transpose(1, 2) for item in self.qkv(x).chunk(3, -1))
        if cache is not None:
            cache.key, cache.calls = k, cache.calls + 1
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """`[2, tokens, 32]`; writes keys into a cache object, facts into a dict, and into a buffer in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor, cache: Any, flags: dict[str, Any], kept: list[torch.Tensor]) -> torch.Tensor:
        flags["tokens"] = x.shape[1]
        flags["steps"] = flags["steps"] + 1
        for layer, part in zip(self.layers, cache.layers, strict=True):
            x = layer(x, part)
        if hasattr(cache, "old"):
            del cache.old
        cache.log.append((x.mean(1), flags["steps"]))
        kept[0][:, 1:] = x[:, :1].mean(0)
        return x


def example() -> dict[str, Any]:
    torch.manual_seed(0)
    x, kept = torch.randn(2, 8, 32), [torch.zeros(3, 4, 32)]
    return {"x": x, "cache": Cache(3), "flags": {"steps": 4}, "kept": kept}


def left(call: dict[str, Any]) -> list[Any]:
    """Everything that a call left."""
    cache = call["cache"]
    found = [call["flags"], call["kept"][0], len(cache.log), *cache.log[-1], hasattr(cache, "old")]
    return [*found, *((layer.key, layer.calls) for layer in cache.layers)]


def close(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("degrees", [{}, {"ulysses": 2}, {"ring": 3}, {"cfg": 2}])
def test_left_as_by_the_module(degrees: dict[str, int]) -> None:
    model, call = Model().eval(), example()
    before = copied(call)
    traced = xir.trace(model, call)
    close(call["flags"], before["flags"])
    assert hasattr(call["cache"], "old")  # tracing leaves nothing
    other = example() | {"x": torch.randn(2, 8, 32)}
    expected = copied(other)
    with torch.no_grad():
        model(**expected)
    holders = other["cache"], other["cache"].layers[1], other["kept"][0]
    if degrees:
        traced.parallelize(**degrees).simulate(model, other)
    else:
        run_single(traced.ir, model, other)
    close(left(other), left(expected))
    assert holders == (other["cache"], other["cache"].layers[1], other["kept"][0])
    assert xir.check(model, example(), **degrees).ok


def test_plain_values_in_objects_are_guarded() -> None:
    model, call = Model().eval(), example()
    traced = xir.trace(model, call)
    call["cache"].layers[0].calls = 3
    with pytest.raises(xir.MismatchError, match="cache"):
        run_single(traced.ir, model, call)


class Mover(nn.Module):
    def forward(self, x: torch.Tensor, cache: dict[str, Any]) -> torch.Tensor:
        cache["again"] = cache["entry"]
        return x + 1


def test_a_moved_container_is_refused() -> None:
    with pytest.raises(xir.TraceError, match="moves a container"):
        xir.trace(Mover(), (torch.ones(2), {"entry": {"a": 1}}))


class Shared(nn.Module):
    """Blocks that read a cache object, which is an argument of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.reader = nn.ModuleList(Reader() for _ in range(3))

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        for reader, part in zip(self.reader, cache.layers, strict=True):
            x = reader(x, part)
        return x


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        return self.inner(x) * cache.key


def test_blocks_with_objects_are_shared(run: Any) -> None:
    model, cache = Shared().eval(), Cache(3)
    for layer in cache.layers:
        layer.key = torch.randn(2, 8, 32)
    x = torch.randn(2, 8, 32)
    program = xir.trace(model, (x, cache)).ir
    assert len(program.blocks) == 1 and len(list(program.calls)) == 3
    with torch.no_grad():
        close(run(program, model, x, cache), model(x, cache))

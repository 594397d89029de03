"""Attributes that forward writes at every call before it reads them: they hold what the model would have left there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.text import parse, write


class Holder:
    pass


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 4), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class Tapped(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x * 2
        return super().forward(self.seen)


class Model(nn.Module):
    """Three layers; `keep(model, x)` is called between the first two, and gives what goes on."""

    def __init__(self, keep: Callable[[Any, torch.Tensor], Any], layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.__dict__["keep"], self.store, self.holder = keep, {"a": 1}, Holder()
        self.last: Any = None
        self.register_buffer("buffer", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        kept = self.keep(self, x)
        for layer in self.layers[1:]:
            x = layer(x if kept is None else kept)
        return x


def attribute(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.last = x.softmax(-1)
    kept: torch.Tensor = model.last
    return kept


def new_attribute(model: Any, x: torch.Tensor) -> None:
    model.fresh = (x, {"half": [x / 2], "rows": len(x)})


def entry(model: Any, x: torch.Tensor) -> None:
    model.store["middle"] = x


def of_an_object(model: Any, x: torch.Tensor) -> None:
    model.holder.middle = x


def a_buffer(model: Any, x: torch.Tensor) -> Any:
    model.buffer = x.mean()[None]
    return x * model.buffer


def a_list(model: Any, x: torch.Tensor) -> Any:
    model.last = []
    for layer in model.layers:
        model.last.append(layer(x))
    return sum(model.last)


def nothing(model: Any, x: torch.Tensor) -> None:
    pass


def held(model: Any) -> Any:
    """All that the functions above write."""
    fresh = [*model.fresh[:1], *model.fresh[1].values()] if hasattr(model, "fresh") else None
    seen = [layer.seen for layer in model.layers]
    return [model.last, fresh, model.store, getattr(model.holder, "middle", None), model.buffer, seen]


def same(left: Any, right: Any) -> None:
    torch.testing.assert_close(*(torch.utils._pytree.tree_leaves(item) for item in (left, right)))


def pair(keep: Callable[..., Any], layer: type[Layer] = Layer) -> tuple[Model, Model]:
    torch.manual_seed(0)
    model, other = Model(keep, layer).eval(), Model(keep, layer).eval()
    other.load_state_dict(model.state_dict())
    return model, other


CASES = [
    *((one, Layer) for one in (attribute, new_attribute, entry, of_an_object, a_buffer, a_list)),
    (nothing, Tapped),
]


@pytest.mark.parametrize(("keep", "layer"), CASES)
def test_what_is_written_first_is_what_the_model_leaves(keep: Callable[..., Any], layer: type[Layer]) -> None:
    model, other = pair(keep, layer)
    ported = xir.port(model)
    with torch.no_grad():
        for rows in (2, 3, 2, 2):  # the second and the third are programs made before
            x = torch.randn(2, rows, 4)
            same(ported(x), other(x))
            same(held(model), held(other))
    assert len(ported.programs) == 2


def test_each_rank_leaves_it_whole() -> None:
    model, other = pair(attribute)
    x = torch.randn(2, 6, 4)
    traced = xir.trace(model, (x,))
    written = write(traced.ir)
    program = parse(written.text, written.attachments)
    assert model.last is None
    with torch.no_grad():
        for out in traced.parallelize(cfg=2).simulate(model, (x,)):
            same(out, other(x))
    same(model.last, other.last)
    assert [effect.path[-1].key for effect in program.signature.effects] == ["last"]


def residual(model: Any, x: torch.Tensor) -> Any:
    before, model.last = model.last, x
    return x if before is None else x + before


def new_residual(model: Any, x: torch.Tensor) -> Any:
    before = getattr(model, "fresh", None)
    model.fresh = x
    return x if before is None else x + before


def of_the_same_shape(model: Any, x: torch.Tensor) -> Any:
    if hasattr(model, "fresh") and model.fresh.shape != x.shape:
        raise ValueError("another shape")
    model.fresh = x
    return x


def in_python(model: Any, x: torch.Tensor) -> Any:
    factor = 1 if model.last is None else int(model.last.sum() > 0) + 1
    model.last = x
    return x * factor


def read_afterwards(model: Any, x: torch.Tensor) -> Any:
    result = x if model.store.get("middle") is None else model.store["middle"]
    model.store["middle"] = x
    return result


@pytest.mark.parametrize("keep", [residual, new_residual, of_the_same_shape, in_python, read_afterwards])
def test_what_is_read_before_is_a_state(keep: Callable[..., Any]) -> None:
    model, _ = pair(keep)
    before = [model.last, dict(model.store)]
    for _ in range(2):
        with pytest.raises(xir.TraceError, match=r"keeps a state between calls, writing .(last|fresh|store)"):
            xir.trace(model, (torch.randn(2, 3, 4),))
    assert [model.last, model.store] == before and not hasattr(model, "fresh")

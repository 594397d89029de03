"""What forward itself raises reaches the caller as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir


class OwnError(Exception):
    """The model's."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), {"silu": nn.functional.silu}
        self.missing: Any = None

    def forward(self, x: torch.Tensor, act: str = "silu", by: int = 1) -> torch.Tensor:
        if x.shape[-1] != 4:
            raise ValueError(f"expected 4 features, got {x.shape[-1]}")
        if act == "undefined":
            x = x * undefined_factor  # type: ignore[name-defined]  # noqa: F821
        if act == "none":
            x = x * self.missing.scale
        if act == "own":
            raise OwnError("no such function") from KeyError(act)
        assert x.dim() == 2, "two dims"
        return self.table[act](self.linear(x)) / (4 // by)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, **options)
        return x


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "options", "kind"),
    [
        ((torch.ones(2, 3),), {}, ValueError),
        ((X,), {"act": "own"}, OwnError),
        ((X,), {"act": "gelu"}, KeyError),
        ((torch.ones(2, 2, 4),), {}, AssertionError),
        ((X,), {"by": 0}, ZeroDivisionError),
        ((X,), {"act": "undefined"}, NameError),
        ((X,), {"act": "none"}, AttributeError),
    ],
)
@torch.no_grad()
def test_the_models_own_errors(args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception]) -> None:
    model = Model()
    ported = xir.port(model)
    with pytest.raises(kind) as want:
        model(*args, **options)
    for _ in range(2):
        with pytest.raises(kind) as got:
            ported(*args, **options)
        assert type(got.value) is type(want.value) and str(got.value).split("\n")[0] == str(want.value).split("\n")[0]
    assert torch.allclose(ported(X), model(X))
    with pytest.raises(xir.TraceError, match=kind.__name__):
        xir.trace(model, {"x": args[0], **options})


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (X.to_sparse(), "torch.sparse_coo"),
        (torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged), "nested"),
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "quantized"),
    ],
    ids=["sparse", "nested", "quantized"],
)
@torch.no_grad()
def test_inputs_that_are_not_dense(x: torch.Tensor, kind: str) -> None:
    with pytest.raises(xir.TraceError, match=f"input 'x' is a {kind} tensor; expected a dense one"):
        xir.port(Model())(x)


@torch.no_grad()
def test_a_port_may_be_compiled_by_who_uses_it() -> None:
    model = Model()
    ported = xir.port(model)
    ported.compile(backend="eager")
    assert torch.allclose(ported(X), model(X))
    ported = xir.port(model)
    assert torch.allclose(torch.compile(ported, backend="eager")(X), model(X)) and ported.program is not None

"""What Python asks of values only to raise an error is taken to be so; what decides anything else is not.

PYTEST_DONT_REWRITE: the models here assert as models do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.capture import trace
from xdit_ir.ir.leaf import Leaf

Run = Callable[..., Any]


def finite(x: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(x).all()


def asserts(x: torch.Tensor) -> None:
    assert torch.allclose(x, x) and finite(x), "not finite"


def asserts_the_contrary(x: torch.Tensor) -> None:
    assert not x.isnan().any()


def raises(x: torch.Tensor) -> None:
    if not finite(x) or x.abs().max() > 1e6:
        raise ValueError(f"values of {x.shape}")


def raises_for_both(x: torch.Tensor) -> None:
    if x.isnan().any() and x.isinf().any():
        raise ValueError("odd")


def compares_a_number(x: torch.Tensor) -> None:
    if x.isnan().sum().item() > 0:
        raise ValueError("NaN")
    assert x.abs().max().item() < 1e6


def asserts_of_torch(x: torch.Tensor) -> None:
    torch._assert((x == x).all(), "unequal")


def asserts_in_a_context(x: torch.Tensor) -> None:
    with torch.no_grad():
        assert finite(x)


def asserts_in_a_loop(x: torch.Tensor) -> None:
    """Of a file that pytest rewrites, as this one: messages are put together before the error is raised."""
    for _ in range(2):
        assert not torch.isnan(x).any()
        assert torch.allclose(x.abs(), x.abs()), "unequal"


def catches(x: torch.Tensor) -> float | None:
    try:
        assert x.sum() > 0
    except AssertionError:
        return 2.0
    return None


def decides(x: torch.Tensor) -> float | None:
    return 2.0 if x.sum() > 0 else None


def stores(x: torch.Tensor) -> float | None:
    positive = bool(x.sum() > 0)
    return 2.0 if positive else None


class Model(nn.Module):
    def __init__(self, ask: Callable[[torch.Tensor], float | None]) -> None:
        super().__init__()
        self.layer, self.asking = nn.Linear(4, 4), Asking(ask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.asking(self.layer(x))
        return result


class Asking(nn.Module):
    def __init__(self, ask: Callable[[torch.Tensor], float | None]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (self.ask(x) or 1.0)


def leaves(model: nn.Module) -> list[Any]:
    return [n.target for n in trace(model, (torch.randn(3, 4),)).graph.nodes if isinstance(n.target, Leaf)]


@pytest.mark.parametrize(
    "ask",
    [
        asserts,
        asserts_the_contrary,
        raises,
        compares_a_number,
        asserts_of_torch,
        asserts_in_a_context,
        asserts_in_a_loop,
        raises_for_both,
    ],
)
def test_taken_to_be_so(ask: Callable[[torch.Tensor], None], run: Run, same: Run) -> None:
    model, x = Model(ask).eval(), torch.randn(3, 4)
    assert not leaves(model)
    with torch.no_grad():
        same(run(trace(model, (x,)), model, x * 2), model(x * 2))


@pytest.mark.parametrize("ask", [catches, decides, stores])
def test_what_decides_more_is_an_opaque_leaf(ask: Callable[[torch.Tensor], float | None]) -> None:
    assert len(leaves(Model(ask).eval())) == 1


class Decoder(nn.Module):
    """Asks whether a mask, kept as a parameter, is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(nn.Transformer.generate_square_subsequent_mask(6), requires_grad=False)
        layer = nn.TransformerDecoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.decoder(x, x, tgt_mask=self.mask)
        return result


def test_parameters_that_are_compared_are_guarded() -> None:
    model = Decoder().eval()
    program = trace(model, (torch.randn(2, 6, 8),))
    assert not any(isinstance(node.target, Leaf) for node in program.graph.nodes)
    assert [guard.path for guard in program.signature.guards if guard.path.endswith("mask")] != []

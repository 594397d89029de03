"""Loops and branches as higher-order operators are written out; transforms of `torch.func` are seen through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from xdit_ir.capture import trace
from xdit_ir.ir.leaf import Leaf

Run = Callable[..., Any]
Body = Callable[[torch.Tensor], torch.Tensor]


def scanned(x: torch.Tensor) -> torch.Tensor:
    last, every = scan(lambda h, y: (0.5 * h + y, torch.tanh(h)), torch.zeros_like(x[0]), x, dim=0, reverse=True)
    return every + last


def scanned_together(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = associative_scan(lambda a, b: a + 2 * b, x, dim=0, combine_mode="generic")
    return result


def mapped(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = map_over(lambda row, scale: row * scale, x, torch.arange(4.0))
    return result


def looped(x: torch.Tensor) -> torch.Tensor:
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, torch.tanh(1.1 * y)), (torch.tensor(0), x))[1]


def branched(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))
    return result


def vectorised(x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: row * torch.arange(len(row)) - row.sum())(x)


def differentiated(x: torch.Tensor) -> torch.Tensor:
    gradient: torch.Tensor = torch.func.grad(lambda y: (y.sin() ** 2).sum())(x)
    return gradient


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.layer(x)) + x


@pytest.mark.parametrize(
    "body", [scanned, scanned_together, mapped, looped, branched, vectorised, differentiated], ids=lambda b: b.__name__
)
def test_written_out(body: Body, run: Run, same: Run) -> None:
    model, x = Model(body).eval(), torch.randn(5, 4)
    program = trace(model, (x,))
    assert not any(isinstance(node.target, Leaf) for node in program.graph.nodes)
    for other in (x, -3 * x):
        same(run(program, model, other), model(other).detach())

"""Rows that a mask selects whose contents cannot be known: all are computed where each is computed by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from xdit_ir.capture import trace
from xdit_ir.errors import TraceError
from xdit_ir.simulation.examples import run_single

Use = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """`[2, 40, 8]` tokens, of which `use` does something to those that `t` marks, in the model's own forward."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use, self.net, self.head = use, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.use(self.net, x * 2, t > 0.5)
        return self.head(x)


def added(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.any():
        x[mask] += torch.tanh(net(x[mask]))
    return x


def two_nets(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for chosen, factor in ((mask, 1.0), (~mask, 3.0)):
        if chosen.sum() == 0:
            continue
        out[chosen] = factor * net(x[chosen])
    return out


def in_heads(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = x[mask]
    count, width = rows.shape
    x[mask] = net(rows).view(count, 2, width // 2).softmax(-1).reshape(count, width)
    return x


@pytest.mark.parametrize("use", [added, two_nets, in_heads])
@pytest.mark.parametrize("least", [-9.0, 0.0, 9.0], ids=["none", "some", "all"])
def test_whatever_the_mask_selects(use: Use, least: float) -> None:
    torch.manual_seed(0)
    model, x, t = Model(use), torch.randn(2, 40, 8), torch.randn(2, 40)
    program = trace(model, (x, t))
    other = (x, t + least)
    with torch.no_grad():
        torch.testing.assert_close(run_single(program, model, other), model(*other))


def mean(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x[mask] += x[mask].mean(0)
    return x


def count(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x[mask] += 1 / x[mask].shape[0]
    return x


def made(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(x[mask].shape[0]).sum()


def returned(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask]


def otherwise(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.any():
        x[mask] += net(x[mask])
    else:
        x = x * 2
    return x


def flagged(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Right for each mask that is empty alone, but not for both."""
    used = False
    for chosen in (mask, ~mask):
        if chosen.any():
            x[chosen] += net(x[chosen])
            used = True
    return x if used else x * 2


@pytest.mark.parametrize("use", [mean, count, made, returned, otherwise, flagged])
def test_what_is_not_row_by_row_is_refused(use: Use) -> None:
    with pytest.raises(TraceError, match=r"cannot be known|may be read"):
        trace(Model(use), (torch.randn(2, 40, 8), torch.randn(2, 40)))

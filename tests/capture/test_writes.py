"""In-place operators, through any views, give the same values in functional form."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.errors import TraceError
from xdit_ir.ir.program import Program

Check = Callable[..., Program]


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


def rotary(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * y[..., 0::2] - x[..., 1::2]
    out[..., 1::2] = x[..., 1::2] * y[..., 1::2] + x[..., 0::2]
    return out


def aliases(x: torch.Tensor, y: torch.Tensor) -> Any:
    base = x * 1
    left, right = base.chunk(2, dim=-1)
    flat = base.view(-1)
    row = base[1]
    left += 1
    row.mul_(y[1])
    flat[3] = 7.0
    right.t()[0] -= 2
    return base, left, right, flat, row, base.sum()


def mixed(x: torch.Tensor, y: torch.Tensor) -> Any:
    half = x.bfloat16()
    half += y.float()
    half[0] = y[1]
    half[:, 1:2].copy_(y[:, :1])
    half.clamp_(-1, 1).exp_()
    counts = torch.zeros(4, dtype=torch.long)
    counts += torch.arange(4)
    return half, half[:, counts], counts


def shapes(x: torch.Tensor, y: torch.Tensor) -> Any:
    base = x.clone()
    wide = base.unsqueeze(0).transpose(1, 2)
    wide.squeeze_(0)
    wide += 1
    wide.unsqueeze_(-1)
    wide.mul_(2)
    for piece in base.unbind(0):
        piece.sub_(3)
    base.diagonal().fill_(9.0)
    torch.view_as_real(z := torch.view_as_complex(base.view(4, 2, 2))).add_(1)
    base.permute(1, 0)[2:].zero_()
    first, _, second = base.split([1, 1, 2])
    second.relu_()
    return base, wide, z, first


def out_variants(x: torch.Tensor, y: torch.Tensor) -> Any:
    out = torch.empty_like(x)
    torch.add(x, y, out=out)
    torch.mul(out, 2, out=out)
    return out


def inputs(x: torch.Tensor, y: torch.Tensor) -> Any:
    z = x
    z = z.contiguous().to(x.dtype)
    return (z + y).add_(x).view(-1)


def expanded_masks(x: torch.Tensor, y: torch.Tensor) -> Any:
    wide = (x > 0).expand(3, 4, 4)
    wide[1, 0] = True  # of one of three that are the same
    some = (x[:, :1] > 0).expand(-1, 4)
    some[y > 1] = True
    shut = (y[:1] > -2).expand(2, 4, 4)
    shut[0].masked_fill_(x > 1, False)
    return wide, some, shut, shut.sum()


FUNCTIONS = [rotary, aliases, mixed, shapes, out_variants, inputs, expanded_masks]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: str(function.__name__))
def test_writes(function: Callable[..., Any], check: Check) -> None:
    call = (torch.randn(4, 4), torch.randn(4, 4))
    program = check(Apply(function), call, (torch.randn(4, 4), torch.randn(4, 4)))
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t[1:],
    lambda t: t[..., ::2],
    lambda t: t.transpose(0, -1),
    lambda t: t[0],
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t.split(1)[-1],
    lambda t: t.chunk(2, -1)[0],
    lambda t: t.unbind(-1)[0],
    lambda t: t.view(-1, 1),
    lambda t: t.squeeze(0),
    lambda t: t.movedim(0, -1),
]
WRITES: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.add_(1),
    lambda t: t.mul_(t.amax()),
    lambda t: t.copy_(t.detach() * 2),
    lambda t: t.fill_(3),
    lambda t: t.clamp_(max=2),
    lambda t: t.tanh_(),
]


@pytest.mark.parametrize("seed", range(25))
def test_random_programs(seed: int, check: Check) -> None:
    """Views of views, written in any order, all read at the end."""

    def program(x: torch.Tensor, y: torch.Tensor) -> Any:
        choose = random.Random(seed)
        live = [x.view(2, 2, 4).clone(), y.clone()]
        for _ in range(14):
            tensor = choose.choice(live)
            try:
                if choose.random() < 0.5 and tensor.dim() < 5:
                    live.append(choose.choice(VIEWS)(tensor))
                elif tensor.numel():
                    choose.choice(WRITES)(tensor)
            except (RuntimeError, ValueError, IndexError):
                continue
        return live

    check(Apply(program), (torch.randn(4, 4), torch.randn(4, 4)), (torch.randn(4, 4), torch.randn(4, 4)))


def test_inputs_may_be_written(check: Check) -> None:
    check(Apply(lambda x, y: x.mul_(0) + y), (torch.randn(4), torch.randn(4)))


def test_state_may_not_be_written() -> None:
    from xdit_ir.capture import trace

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(TraceError, match="keeps a state between calls, writing 'calls'"):
        trace(Counts(), (torch.randn(2),))

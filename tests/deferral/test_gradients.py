"""Parallel programs record no gradients: whoever needs one is told so, and nothing is silently detached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import xdit_ir as xir
from xdit_ir.deferral.deferred import pending
from xdit_ir.deferral.gradients import without_gradients


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.linear(x)
        return y if scale is None else y * scale


def ported(model: nn.Module) -> nn.Module:
    return xir.port(model)


def emitted(model: nn.Module) -> nn.Module:
    return xir.trace(model, (torch.ones(2, 4),)).parallelize().emit(model)


Make = Callable[[nn.Module], nn.Module]
both = pytest.mark.parametrize("make", [ported, emitted])


@both
def test_an_input_that_requires_a_gradient_is_refused_by_name(make: Make) -> None:
    x = torch.ones(2, 4, requires_grad=True)
    module = make(Layer())
    with pytest.raises(xir.GradientError, match=r"x requires a gradient.*no_grad"):
        module(x)
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x)


def test_so_is_one_that_follows_from_another_and_one_given_by_name() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(xir.GradientError, match="scale requires a gradient"):
        xir.port(Layer())(x.detach(), scale=(x * 2)[0])


@both
def test_the_gradient_of_a_weight_is_refused_when_it_is_asked_for(make: Make) -> None:
    model, x, other = Layer(), torch.ones(2, 4), torch.ones((), requires_grad=True)
    result = make(model)(x)
    assert torch.allclose(result, model(x)) and result.requires_grad
    with pytest.raises(xir.GradientError, match=r"weights.*no_grad"):
        (result.square().mean() + other).backward()
    assert other.grad is None or model.linear.weight.grad is None
    with pytest.raises(xir.GradientError):
        torch.autograd.grad(make(model)(x).sum(), [model.linear.weight])


@both
def test_frozen_weights_need_none(make: Make) -> None:
    model = Layer().requires_grad_(False)
    assert not make(model)(torch.ones(2, 4)).requires_grad


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_functions_are_refused(transform: Any) -> None:
    module = xir.port(Layer().requires_grad_(False))
    x = torch.ones(2, 4)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return module(x).sum()

    with torch.no_grad():
        module(x)
    with pytest.raises(xir.GradientError, match=r"torch\.func"):
        transform(loss)(torch.ones(3, 2, 4) if transform is torch.func.vmap else x)


def test_tangents_are_refused() -> None:
    module = xir.port(Layer().requires_grad_(False))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2, 4), torch.ones(2, 4))
        with pytest.raises(xir.GradientError, match="x has a tangent"):
            module(dual)


def test_a_result_that_is_not_there_yet_refuses_too() -> None:
    class Later:
        def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
            return self.whole().narrow(dim, start, stop - start)

        def whole(self) -> torch.Tensor:
            return torch.ones(2, 4)

    deferred = pending(Later(), (2, 4), torch.float32, torch.device("cpu"))
    (result,) = without_gradients([deferred], [nn.Parameter(torch.ones(1))])
    loss = (result * 2).sum()
    assert loss.item() == 16
    with pytest.raises(xir.GradientError):
        loss.backward()


def test_results_of_integers_have_none_anyway() -> None:
    found = without_gradients([torch.ones(2, dtype=torch.int64)], [nn.Parameter(torch.ones(1))])
    assert not found[0].requires_grad

"""Parallel programs record no gradients: a call that needs them is refused, and nothing is silently detached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad

from xdit_ir.deferral.deferred import Deferred
from xdit_ir.errors import GradientError
from xdit_ir.transport.handshake import call_tensors

ADVICE = "parallel programs are for inference: call it under torch.no_grad(), or train the module that was ported"


def gradient_refusal(
    signature: Callable[[], inspect.Signature], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> GradientError | None:
    """Why a call cannot be made as far as gradients are concerned: an input would have one, or is transformed."""
    transformed = peek_interpreter_stack() is not None
    dual = forward_ad._current_level >= 0
    if not (torch.is_grad_enabled() or transformed or dual):
        return None
    for name, x in call_tensors(signature(), args, kwargs).items():
        if transformed and is_functorch_wrapped_tensor(x):
            return GradientError(f"{name} is under a transform of torch.func (grad, vmap, ...); {ADVICE}")
        if dual and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            return GradientError(f"{name} has a tangent of torch.autograd.forward_ad; {ADVICE}")
        if torch.is_grad_enabled() and x.requires_grad:
            return GradientError(f"{name} requires a gradient; {ADVICE}")
    return None


def without_gradients(results: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The results of a call; where autograd records and a weight requires a gradient, such that raise a
    `GradientError` when one is asked for."""
    if not torch.is_grad_enabled():
        return results
    trained = next((weight for weight in weights if weight.requires_grad), None)
    if trained is None:
        return results
    return [_Refused.apply(x, trained) if _differentiable(x) else x for x in results]  # type: ignore[no-untyped-call]


def _differentiable(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


class _Refused(torch.autograd.Function):
    """The identity, as far as its gradient is not asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return Deferred(x.value) if isinstance(x, Deferred) else x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise GradientError(f"a gradient of the model's weights was asked for; {ADVICE}")

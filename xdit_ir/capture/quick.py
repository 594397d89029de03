"""Types of results of the operators that are called most, told without running them on fake tensors, which is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from xdit_ir.capture.fakes import device_of, is_fake
from xdit_ir.capture.operators import aten

Shape = tuple[int, ...]


def quick_shape(func: Any, args: Any, kwargs: Any) -> Shape | None:
    """The shape of the result, which is dense and otherwise like the first argument; None where that is not certain."""
    tell = _TOLD.get(func)
    if tell is None or kwargs or not all(arg is None or isinstance(arg, torch.Tensor) for arg in (args[0], *args[2:4])):
        return None
    x = args[0]
    given = [arg for arg in args if isinstance(arg, torch.Tensor)]
    like = all(is_fake(one) and one.dtype == x.dtype and device_of(one) == device_of(x) for one in given)
    certain = like and x.dtype.is_floating_point and x.is_contiguous() and x.numel() > 0
    return tell(x, *args[1:]) if certain else None


def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> Shape | None:
    if x.ndim < 2 or not isinstance(weight, torch.Tensor) or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return None
    fits = bias is None or bias.shape == weight.shape[:1]
    return (*x.shape[:-1], weight.shape[0]) if fits else None


def _norm(x: torch.Tensor, normalized: Any, *rest: Any) -> Shape | None:
    over = tuple(normalized)
    weights = [one for one in rest if isinstance(one, torch.Tensor)]
    fits = 0 < len(over) <= x.ndim and x.shape[-len(over) :] == over and all(one.shape == over for one in weights)
    return tuple(x.shape) if fits else None


_TOLD: Mapping[Any, Callable[..., Shape | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
}

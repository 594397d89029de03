"""Results of the operators that are called most, told without running them on fake tensors, which is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.fakes import device_of, is_fake
from xdit_ir.capture.operators import aten

Form = tuple[list[int], list[int]]  # sizes and strides
Place = tuple[list[int], list[int], int]  # sizes, strides and offset


def quick_result(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """On the meta device, in the memory of the first argument if it is a view; None if it is not certain."""
    x = args[0] if args and not kwargs else None
    if not isinstance(x, torch.Tensor) or not is_fake(x):
        return None
    if func in _PLACED:
        place = _PLACED[func](x, *args[1:]) if _is_plain(x) else None
        return None if place is None else _view(x, *place)
    tell = _TOLD.get(func)
    given = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if tell is None or not x.dtype.is_floating_point or not all(_is_like(one, x) for one in given):
        return None
    told = tell(x, *args[1:])
    return None if told is None else torch.empty_strided(*told, dtype=x.dtype, device="meta")


def _is_like(one: torch.Tensor, x: torch.Tensor) -> bool:
    return is_fake(one) and one.dtype == x.dtype and device_of(one) == device_of(x)


def _is_plain(x: torch.Tensor) -> bool:
    return x.layout is torch.strided and not x.dtype.is_complex and x.ndim > 0


def _view(x: torch.Tensor, sizes: list[int], strides: list[int], offset: int) -> torch.Tensor:
    made = torch.empty(0, dtype=x.dtype, device="meta")
    return made.set_(x.untyped_storage(), offset, sizes, strides)


def _select(x: torch.Tensor, dim: int, index: int) -> Place | None:
    if not -x.ndim <= dim < x.ndim or not -x.shape[dim] <= index < x.shape[dim]:
        return None
    sizes, strides = list(x.shape), list(x.stride())
    first = index % sizes.pop(dim)
    return sizes, strides, int(x.storage_offset()) + first * strides.pop(dim)


def _slice(x: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Place | None:
    if not -x.ndim <= dim < x.ndim or step < 1:
        return None
    sizes, strides = list(x.shape), list(x.stride())
    taken = range(*slice(start, end, step).indices(sizes[dim]))
    if not taken:
        return None
    offset = int(x.storage_offset()) + taken.start * strides[dim]
    sizes[dim], strides[dim] = len(taken), strides[dim] * step
    return sizes, strides, offset


def _linear(x: torch.Tensor, weight: Any, bias: Any = None) -> Form | None:
    if not _is_dense(x) or not (bias is None or isinstance(bias, torch.Tensor)):
        return None
    if x.ndim < 2 or not isinstance(weight, torch.Tensor) or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return None
    fits = bias is None or bias.shape == weight.shape[:1]
    return _dense([*x.shape[:-1], weight.shape[0]]) if fits else None


def _norm(x: torch.Tensor, normalized: Any, *rest: Any) -> Form | None:
    over = tuple(normalized)
    if not _is_dense(x) or not all(one is None or isinstance(one, torch.Tensor) for one in rest[:2]):
        return None
    weights = [one for one in rest if isinstance(one, torch.Tensor)]
    fits = 0 < len(over) <= x.ndim and x.shape[-len(over) :] == over and all(one.shape == over for one in weights)
    return _dense([*x.shape]) if fits else None


def _pointwise(x: torch.Tensor, other: Any) -> Form | None:
    """Of two tensors of one shape, or of one and a number; of rows of images, whose dims may be in any order."""
    given = [x, other] if isinstance(other, torch.Tensor) else [x]
    if x.numel() == 0 or any(one.shape != x.shape for one in given):
        return None
    if not isinstance(other, (torch.Tensor, int, float)):
        return None
    if all(one.is_contiguous() for one in given):
        return _dense([*x.shape])
    if any(map(_is_ordered, given)):
        return None
    orders = {_order(one) for one in given}
    return _dense([*x.shape], orders.pop()) if len(orders) == 1 and None not in orders else None


def _is_ordered(x: torch.Tensor) -> bool:
    """Whether it is in one of PyTorch's orders of memory, and with dims of one index perhaps in several."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])]
    return any(x.is_contiguous(memory_format=one) for one in formats)


def _order(x: torch.Tensor) -> Sequence[int] | None:
    """The dims as they lie in memory, the outermost first; None if that is not certain."""
    strides = x.stride()
    if len({*strides}) < x.ndim or min(strides) < 1:
        return None
    return tuple(sorted(range(x.ndim), key=lambda dim: -strides[dim]))


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.numel() > 0


def _dense(sizes: list[int], order: Sequence[int] | None = None) -> Form:
    """That of a tensor without gaps."""
    strides, step = [1] * len(sizes), 1
    for dim in reversed(range(len(sizes)) if order is None else order):
        strides[dim], step = step, step * sizes[dim]
    return sizes, strides


_TOLD: Mapping[Any, Callable[..., Form | None]] = {
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.mul.Tensor: _pointwise,
    aten.add.Tensor: _pointwise,
}
_PLACED: Mapping[Any, Callable[..., Place | None]] = {aten.select.int: _select, aten.slice.Tensor: _slice}

"""Results of the operators that are called most, told without running them on fake tensors, which is slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.fakes import device_of, is_fake
from xdit_ir.capture.operators import aten
from xdit_ir.capture.values import map_tensors, share_memory, tensors_in

Place = tuple[list[int], list[int], int]  # sizes, strides and offset


def quick_result(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """On the meta device, in the memory of the first argument if it is a view; None if it is not certain."""
    if func in _ON_META:
        return _on_meta(func, args, kwargs)
    x = args[0] if args and not kwargs else None
    if func not in _PLACED or not isinstance(x, torch.Tensor) or not is_fake(x) or not _is_plain(x):
        return None
    place = _PLACED[func](x, *args[1:])
    return None if place is None else _view(x, *place)


def _on_meta(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What PyTorch's own kernel for the meta device says, where no other device says anything else."""
    given = tensors_in(args)
    if not given or not kwargs.keys() <= {"dtype"} or not all(is_fake(one) and _is_plain(one) for one in given):
        return None
    devices = {device_of(one) for one in given}
    orders = [_orders(one) for one in given]
    if len(devices) > 1 or not _is_certain(func, given, orders) or torch.is_autocast_enabled(devices.pop().type):
        return None
    twins = map_tensors(tuple(args), lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    try:
        made = func(*twins, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):  # the run on fakes refuses it in its own words
        return None
    return None if share_memory(made, twins) else made


def _is_certain(func: Any, given: Sequence[torch.Tensor], orders: Sequence[Sequence[Any]]) -> bool:
    """Whether the order in memory of what is made is that of what is given, by every kernel."""
    if any(one.numel() == 0 or not one.dtype.is_floating_point for one in given):
        return False
    strict = [found == [torch.contiguous_format] for found in orders]
    if func in _POINTWISE and len({one.shape for one in given}) == 1:
        return len(given) == 1 or all(len(found) < 2 for found in orders)
    if func in _POINTWISE:  # vectors along some dim beside a tensor in order
        return any(strict) and all(one or x.numel() == max(x.shape) for one, x in zip(strict, given, strict=True))
    return all(strict)


def _orders(x: torch.Tensor) -> list[Any]:
    """In which of PyTorch's orders of memory a tensor is: with dims of one index perhaps in several."""
    formats = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])]
    return [one for one in formats if x.is_contiguous(memory_format=one)]


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


def _reshape(x: torch.Tensor, shape: Any) -> Place | None:
    if not _is_dense(x) or not all(type(size) is int and size > 0 for size in shape):
        return None
    sizes, strides = _dense([*shape])
    return (sizes, strides, int(x.storage_offset())) if math.prod(sizes) == x.numel() else None


def _permute(x: torch.Tensor, dims: Any) -> Place | None:
    order = [dim % x.ndim for dim in dims]
    if sorted(order) != [*range(x.ndim)] or min(dims) < -x.ndim or max(dims) >= x.ndim:
        return None
    return [x.shape[dim] for dim in order], [x.stride(dim) for dim in order], int(x.storage_offset())


def _transpose(x: torch.Tensor, one: int, other: int) -> Place | None:
    if not all(-x.ndim <= dim < x.ndim for dim in (one, other)):
        return None
    order = [*range(x.ndim)]
    order[one], order[other] = order[other], order[one]
    return _permute(x, order)


def _unsqueeze(x: torch.Tensor, dim: int) -> Place | None:
    if not -x.ndim - 1 <= dim <= x.ndim:
        return None
    place, sizes, strides = dim % (x.ndim + 1), [*x.shape], [*x.stride()]
    strides.insert(place, sizes[place] * strides[place] if place < x.ndim else 1)
    sizes.insert(place, 1)
    return sizes, strides, int(x.storage_offset())


def _expand(x: torch.Tensor, shape: Any) -> Place | None:
    if len(shape) != x.ndim or not all(
        (type(size) is int and size in (-1, have)) or (have == 1 and size > 0)
        for size, have in zip(shape, x.shape, strict=True)
    ):
        return None
    pairs = [*zip(x.shape, shape, x.stride(), strict=True)]
    sizes = [have if size == -1 else size for have, size, _ in pairs]
    strides = [stride if have == size or size == -1 else 0 for have, size, stride in pairs]
    return sizes, strides, int(x.storage_offset())


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.numel() > 0


def _dense(sizes: list[int]) -> tuple[list[int], list[int]]:
    """The sizes and strides of a tensor without gaps."""
    strides, step = [1] * len(sizes), 1
    for dim in reversed(range(len(sizes))):
        strides[dim], step = step, step * sizes[dim]
    return sizes, strides


_PLACED: Mapping[Any, Callable[..., Place | None]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
}
_POINTWISE = frozenset(
    (
        *(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor),
        *(aten.silu.default, aten.gelu.default, aten.clamp_min.default, aten._to_copy.default, aten.clone.default),
    )
)
_ON_META = _POINTWISE | frozenset(
    (
        *(aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.linalg_vector_norm.default),
        *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
        *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec),
        *(aten.pad.default, aten.constant_pad_nd.default, aten.cat.default),
    )
)

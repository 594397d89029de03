"""Results of the operators that are called most, told without running them on fake tensors, which is slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.operators import aten
from xdit_ir.reflection.fakes import device_of, is_fake
from xdit_ir.reflection.tensors import map_tensors, share_memory, tensors_in

Form = tuple[list[int], list[int]]  # sizes and strides
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
    """Told from sizes and strides, or by PyTorch's own kernel for the meta device where all other devices agree."""
    given = tensors_in(args)
    if not given or not kwargs.keys() <= {"dtype"} or not all(is_fake(one) and _is_plain(one) for one in given):
        return None
    devices = {device_of(one) for one in given}
    if len(devices) > 1 or any(one.numel() == 0 or not one.dtype.is_floating_point for one in given):
        return None
    if not kwargs and len({one.dtype for one in given}) == 1 and (form := _told(func, args, given)) is not None:
        return torch.empty_strided(*form, dtype=given[0].dtype, device="meta")
    if not _is_certain(func, given) or torch.is_autocast_enabled(devices.pop().type):
        return None
    twins = map_tensors(tuple(args), lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    try:
        made = func(*twins, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError):  # the run on fakes refuses it in its own words
        return None
    return None if share_memory(made, twins) else made


def _told(func: Any, args: Any, given: Sequence[torch.Tensor]) -> Form | None:
    """Of tensors of one type; None if it is not certain."""
    if func in _POINTWISE:
        return None if any(isinstance(arg, complex) for arg in args) else _pointwise(given)
    sizes = _SIZES[func](*args) if func in _SIZES and all(one.is_contiguous() for one in given) else None
    return None if sizes is None else _dense(sizes)


def _pointwise(given: Sequence[torch.Tensor]) -> Form | None:
    """Of tensors of one shape; of rows of images, whose dims may be in any order."""
    shape = given[0].shape
    if any(one.shape != shape for one in given):
        return None
    if all(one.is_contiguous() for one in given):
        return _dense([*shape])
    orders = {None if _orders(one) else _order(one) for one in given}
    return _dense([*shape], orders.pop()) if len(orders) == 1 and None not in orders else None


def _is_certain(func: Any, given: Sequence[torch.Tensor]) -> bool:
    """Whether the order in memory of what is made is that of what is given, by every kernel."""
    orders = [_orders(one) for one in given]
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


def _unchanged(x: torch.Tensor, *rest: Any) -> list[int]:
    return [*x.shape]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> list[int] | None:
    if x.ndim < 2 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return None
    fits = bias is None or bias.shape == weight.shape[:1]
    return [*x.shape[:-1], weight.shape[0]] if fits else None


def _norm(x: torch.Tensor, normalized: Any, *rest: Any) -> list[int] | None:
    over = tuple(normalized)
    weights = [one for one in rest if isinstance(one, torch.Tensor)]
    fits = 0 < len(over) <= x.ndim and x.shape[-len(over) :] == over and all(one.shape == over for one in weights)
    return [*x.shape] if fits else None


def _group_norm(x: torch.Tensor, groups: int, *rest: Any) -> list[int] | None:
    if x.ndim < 2 or len(_orders(x)) != 1:
        return None
    weights = [one for one in rest if isinstance(one, torch.Tensor)]
    fits = groups > 0 and x.shape[1] % groups == 0 and all(one.shape == x.shape[1:2] for one in weights)
    return [*x.shape] if fits else None


def _length(x: torch.Tensor, order: Any = 2, dims: Any = None, keepdim: bool = False) -> list[int] | None:
    if dims is None or len(dims) != 1 or not -x.ndim <= dims[0] < x.ndim or not keepdim:
        return None
    return [1 if dim == dims[0] % x.ndim else size for dim, size in enumerate(x.shape)]


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
        *(aten.silu.default, aten._to_copy.default, aten.clone.default),
    )
)
_SIZES: Mapping[Any, Callable[..., list[int] | None]] = {
    aten.gelu.default: _unchanged,
    aten.clamp_min.default: _unchanged,
    aten.linear.default: _linear,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.group_norm.default: _group_norm,
    aten.linalg_vector_norm.default: _length,
}
_CERTAIN = frozenset(
    (
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
        *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec),
        *(aten.pad.default, aten.constant_pad_nd.default, aten.cat.default),
    )
)
_ON_META = _POINTWISE | _SIZES.keys() | _CERTAIN

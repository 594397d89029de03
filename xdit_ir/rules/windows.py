"""Operators on images: padding, resizing, pooling, shuffling of pixels. Batch and channels stay free."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call, verified
from xdit_ir.rules.labels import Labels, by_argument, handle_empty_parts, labelled, plain

aten = torch.ops.aten


def _leading(spatial: int, channels: bool = True) -> Callable[[OpCall], Labels]:
    """The last `spatial` dims must be whole, and the channels before them unless each is treated alone."""
    behind = spatial if channels else spatial + 1

    def describe(call: OpCall) -> Labels:
        slot = call.slots[0]
        names = plain(call.specs[0], range(-behind, 0))
        free = names[: len(names) - behind]
        results = ((*free, *(None,) * (len(spec.shape) - len(free))) for spec in call.results)
        return by_argument(call, *results, **{slot: names})

    return describe


def _factors(call: OpCall) -> dict[int, int]:
    """By how much resizing to the nearest repeats the elements of each spatial dim; dims whose results are no whole
    repetitions, in the operator's own arithmetic too, are left out."""
    shape, out = call.specs[0].shape, call.out.shape
    found = {}
    for dim in range(2, len(shape)):
        factor = out[dim] // max(shape[dim], 1)
        if factor and factor * shape[dim] == out[dim] and _repeats(shape[dim], factor):
            found[dim] = factor
    return found


@lru_cache(maxsize=4096)
def _repeats(size: int, factor: int) -> bool:
    """Whether `floor(i / factor)`, in single precision by a product as kernels have it, is that for all results."""
    results = np.arange(size * factor)
    read = (results.astype(np.float32) * np.float32(1 / factor)).astype(np.int64)
    return bool((np.minimum(read, size - 1) == results // factor).all())


def _shuffled(call: OpCall) -> dict[int, int]:
    """By how much `pixel_shuffle` lengthens rows and columns, and `pixel_unshuffle` shortens them."""
    given, ndim = call.arguments, len(call.out.shape)
    factor = given.get("upscale_factor") or given["downscale_factor"]
    return {ndim - 2: factor, ndim - 1: factor}


def _whole_beside(layout: Layout, factors: dict[int, int], first: int) -> Layout:
    """The layout with all dims from `first` on (counted from behind if negative) whole, but those of `factors`."""
    dims = range(len(layout.dims))[first:]
    return layout.with_dims({dim: None for dim in dims if dim not in factors})


def _enlarged(first: int, factors: Callable[[OpCall], dict[int, int]]) -> Rule:
    """Operators of which each rank makes the results for what it holds: dims from `first` on become longer by these
    factors, or stay whole."""

    def forward(call: OpCall) -> OpSharding:
        by = factors(call)
        taken = _whole_beside(call.layouts[0].summed(), by, first)
        output = taken.with_dims({d: p.longer(f) for d, f in by.items() if (p := taken.dims[d]) is not None})
        if not any(output.dims[dim] for dim in by):
            return handle_empty_parts(call, OpSharding((taken,), output))
        return handle_empty_parts(call, OpSharding((taken,), output, lambda rank: _resized(call, output, rank)))

    def demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
        by = factors(call)
        changes = {d: p.shorter(f) for d, f in by.items() if (p := wanted.dims[d]) is not None}
        beside = _whole_beside(wanted, by, first)
        return None if None in changes.values() or beside != wanted else (wanted.with_dims(changes),)

    return verified(Rule(forward, demand))


def _resized(call: OpCall, output: Layout, rank: int) -> LocalCall:
    """The call with a rank's own sizes, where sizes are given."""
    if call.arguments.get("output_size") is None:
        return same_call(call)
    return same_call(call, output_size=list(output.local_shape(call.out.shape, rank))[2:])


def _unshuffle(call: OpCall) -> OpSharding:
    by = _shuffled(call)
    taken = _whole_beside(call.layouts[0].summed(), by, -3)
    fits = {d: p.shorter(f) for d, f in by.items() if (p := taken.dims[d]) is not None}
    taken = taken.with_dims({dim: None for dim, partition in fits.items() if partition is None})
    return handle_empty_parts(call, OpSharding((taken,), taken.with_dims(fits)))


def _unshuffle_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    by = _shuffled(call)
    if _whole_beside(wanted, by, -3) != wanted:
        return None
    return (wanted.with_dims({d: p.longer(f) for d, f in by.items() if (p := wanted.dims[d]) is not None}),)


def _sampled(call: OpCall) -> Labels:
    """`grid_sampler`: per sample; channels are free in the image, positions in the grid."""
    ndim = len(call.specs[0].shape)
    places = tuple(("place", d) for d in range(ndim - 2))
    return by_argument(call, (0, 1, *places), input=(0, 1, *(None,) * (ndim - 2)), grid=(0, *places, None))


def _amounts(call: OpCall) -> dict[int, tuple[int, int]]:
    """What is added before and after each dim that is padded at all."""
    flat = list(call.arguments["pad"])
    pairs = zip(flat[::2], flat[1::2], strict=True)
    ndim = len(call.out.shape)
    return {ndim - 1 - i: (before, after) for i, (before, after) in enumerate(pairs) if before or after}


def _padded(partition: Partition, before: int, after: int) -> Partition | None:
    """Ranks with the first or the last index, at the edge of their parts, hold the padding next to it too."""
    last = partition.size - 1
    parts = []
    for part in partition.parts:
        starts, ends = (bool(part.size and part.array[edge] == at) for edge, at in ((0, 0), (-1, last)))
        if (before and (0 in part.array) != starts) or (after and (last in part.array) != ends):
            return None
        left = Indices.range(0, before if starts else 0)
        right = Indices.range(last + 1 + before, last + 1 + before + (after if ends else 0))
        parts.append(left.concat(part.shift(before)).concat(right))
    return Partition(partition.size + before + after, tuple(parts))


def _is_constant(call: OpCall) -> bool:
    return bool(call.arguments.get("mode", "constant") == "constant")


def _pad(call: OpCall) -> OpSharding:
    """Constant padding is local; other kinds, and cropping, need the dim whole."""
    layout, amounts = call.layouts[0].summed(), _amounts(call)
    gives: dict[int, Partition | None] = {}
    for dim, (before, after) in amounts.items():
        own = layout.dims[dim]
        free = own is not None and _is_constant(call) and min(before, after) >= 0
        gives[dim] = _padded(own, before, after) if own is not None and free else None
    needs = layout.with_dims({dim: None for dim, partition in gives.items() if partition is None})
    output = needs.with_dims(gives)
    if not any(gives.values()):
        return handle_empty_parts(call, OpSharding((needs,), output))

    def local(rank: int) -> LocalCall:
        flat = [0] * (2 * len(output.dims))
        for dim, (before, after) in amounts.items():
            if output.dims[dim] is not None:
                part, size = output.dims[dim].parts[rank], call.out.shape[dim]  # type: ignore[union-attr]
                before = part.within(Indices.range(0, before)).size
                after = part.within(Indices.range(size - after, size)).size
            at = 2 * (len(output.dims) - 1 - dim)
            flat[at : at + 2] = [before, after]
        return same_call(call, pad=flat)

    return handle_empty_parts(call, OpSharding((needs,), output, local))


def _pad_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    changes: dict[int, Partition | None] = {}
    for dim, (before, _) in _amounts(call).items():
        partition, size = wanted.dims[dim], call.specs[0].shape[dim]
        if partition is not None:
            start = before
            changes[dim] = partition.map(
                size,
                lambda part, a=start, n=size: part.select(a, a + n)[0],  # type: ignore[misc]
            )
    return (wanted.with_dims(changes),)


def _edge_pad(call: OpCall) -> Labels:
    """`reflection_pad2d` and its kin."""
    return _leading(len(call.arguments["padding"]) // 2)(call)


def _resampled(*names: str) -> list[object]:
    return [getattr(aten, name) for name in names]


RULES = {
    **rules_of(verified(Rule(_pad, _pad_demand)), aten.constant_pad_nd, aten.pad),
    **rules_of(
        labelled(_edge_pad),
        *_resampled(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))),
    ),
    **{
        packet: labelled(_leading(n))
        for n, modes in ((1, ("linear",)), (2, ("bilinear", "bicubic")), (3, ("trilinear",)))
        for packet in (
            *_resampled(*(f"upsample_{mode}{n}d" for mode in modes)),
            *_resampled(f"avg_pool{n}d", f"max_pool{n}d", f"adaptive_avg_pool{n}d", f"adaptive_max_pool{n}d"),
        )
    },
    **rules_of(
        _enlarged(2, _factors),
        *_resampled(*(f"{name}{n}d" for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3))),
    ),
    **rules_of(
        labelled(_leading(2)),
        aten._upsample_bilinear2d_aa,
        aten._upsample_bicubic2d_aa,
        aten.max_pool2d_with_indices,
        aten._adaptive_avg_pool2d,
    ),
    **rules_of(labelled(_leading(3)), aten.max_pool3d_with_indices, aten._adaptive_avg_pool3d),
    **rules_of(_enlarged(-3, _shuffled), aten.pixel_shuffle),
    **rules_of(verified(Rule(_unshuffle, _unshuffle_demand)), aten.pixel_unshuffle),
    **rules_of(labelled(_leading(2, channels=False)), aten.channel_shuffle, aten.im2col),
    **rules_of(labelled(_leading(1, channels=False)), aten.col2im),
    **rules_of(labelled(_sampled), aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d),
}

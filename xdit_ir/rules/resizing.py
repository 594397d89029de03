"""Resizing of images to the nearest and smoothly, and shuffles of pixels; batch and channels stay free."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call, verified
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import handle_empty_parts, labelled
from xdit_ir.rules.sliding import Held, Windows, windowed
from xdit_ir.rules.windows import leading

aten = torch.ops.aten


def _sizes(call: OpCall) -> list[tuple[int, int, int]]:
    """Each spatial dim, its length and that of the result."""
    shape, out = call.specs[0].shape, call.out.shape
    return [(dim, shape[dim], out[dim]) for dim in range(2, len(shape))]


def _factors(call: OpCall) -> dict[int, int]:
    """By how much resizing to the nearest repeats the elements of each spatial dim; dims whose results are no whole
    repetitions, in the operator's own arithmetic too, are left out."""
    whole = ((dim, size, out // size) for dim, size, out in _sizes(call) if size and out and out % size == 0)
    return {dim: by for dim, size, by in whole if _reads_as_said(size, size * by)}


@lru_cache(maxsize=4096)
def _reads_as_said(size: int, out: int) -> bool:
    """Whether `floor(i * size / out)`, in single precision by a product as kernels have it, is that for all results."""
    results = np.arange(out)
    read = (results.astype(np.float32) * np.float32(size / out)).astype(np.int64)
    return bool((np.minimum(read, size - 1) == results * size // out).all())


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


def _scaled_by_sizes(call: OpCall) -> bool:
    """Whether results are where the sizes say: not at corners, and by no scale that is not the ratio of sizes."""
    given = call.arguments
    if given.get("align_corners") or any(0 in (size, out) for _, size, out in _sizes(call)):
        return False
    scales = given.get("scale_factors")
    if scales is None:
        scales = [value for name, value in given.items() if name.startswith("scales")]
    pairs = zip(scales, _sizes(call), strict=False)
    return all(scale is None or scale * size == out for scale, (_, size, out) in pairs)


def _smooth(mode: str, before: int, after: int, *, antialias: bool = False) -> Rule:
    """Resizing by kernels that are told sizes only: they get runs that become whole results, and some results of them
    are dropped. Along each dim a result takes `before` elements in front of its place, and `after` behind it."""

    def window(size: int, out: int) -> Window:
        if mode == "nearest":
            return Window.resized(size, out)
        return Window.around(size, out, after) if antialias else Window.tapped(size, out, before, after)

    def windows(call: OpCall) -> Windows:
        return {dim: window(size, out) for dim, size, out in _sizes(call)}

    def local(call: OpCall, held: list[Held]) -> LocalCall:
        used, sizes, kept = zip(*map(_placed, held), strict=True)
        return (
            ops.cut_resize,
            (call.arguments["self" if "self" in call.arguments else "input"], used, sizes, kept),
            {
                "mode": mode,
                "antialias": antialias,
            },
        )

    def divides(call: OpCall) -> bool:
        exact = mode != "nearest" or all(_reads_as_said(size, out) for _, size, out in _sizes(call))
        return exact and _scaled_by_sizes(call)

    inside = windowed(windows, local)
    return Rule.by(lambda call: inside if divides(call) else labelled(leading(len(call.out.shape) - 2)))


def _placed(one: Held) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """What to take of what is held, how long it becomes, and what to keep of that."""
    window, (start, length) = one.window, one.used
    every = window.out // (window.size // window.unit)
    first = (one.held.runs[0][0] + start) // window.unit * every
    return (start, length), length // window.unit * every, (one.made.runs[0][0] - first, one.made.size)


def _nearest(call: OpCall) -> Rule:
    return ENLARGED if len(_factors(call)) == len(_sizes(call)) else NEAREST


ENLARGED, NEAREST = _enlarged(2, _factors), _smooth("nearest", 0, 0)

RULES = {
    **{getattr(aten, f"upsample_nearest{n}d"): Rule.by(_nearest) for n in (1, 2, 3)},
    **{getattr(aten, f"_upsample_nearest_exact{n}d"): ENLARGED for n in (1, 2, 3)},
    **rules_of(_smooth("linear", 0, 1), aten.upsample_linear1d),
    **rules_of(_smooth("bilinear", 0, 1), aten.upsample_bilinear2d),
    **rules_of(_smooth("bicubic", 1, 2), aten.upsample_bicubic2d),
    **rules_of(_smooth("trilinear", 0, 1), aten.upsample_trilinear3d),
    **rules_of(_smooth("bilinear", 1, 1, antialias=True), aten._upsample_bilinear2d_aa),
    **rules_of(_smooth("bicubic", 2, 2, antialias=True), aten._upsample_bicubic2d_aa),
    **rules_of(_enlarged(-3, _shuffled), aten.pixel_shuffle),
    **rules_of(verified(Rule(_unshuffle, _unshuffle_demand)), aten.pixel_unshuffle),
}

"""Resizing of images to the nearest and smoothly, and shuffles of pixels; batch and channels stay free."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from xdit_ir.ir import window_ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.resampling import Place, resampled
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call, verified
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import handle_empty_parts, labelled
from xdit_ir.rules.sliding import Held, Windows, windowed
from xdit_ir.rules.windows import leading

aten = torch.ops.aten
# Parts of an image that begin and end at multiples of so many elements are left to kernels that are told sizes only.
FINEST = 2


def _sizes(call: OpCall) -> list[tuple[int, int, int]]:
    """Each spatial dim, its length and that of the result."""
    shape, out = call.specs[0].shape, call.out.shape
    return [(dim, shape[dim], out[dim]) for dim in range(2, len(shape))]


def _factors(call: OpCall) -> dict[int, int]:
    """By how much resizing to the nearest repeats the elements of each spatial dim; dims whose results are no whole
    repetitions, in the operator's own arithmetic too, are left out."""
    if not _scaled_by_sizes(call):
        return {}
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


def _scales(call: OpCall) -> list[float | None]:
    """Along each spatial dim by how much it was asked to become longer, where that is told."""
    scales = call.arguments.get("scale_factors")
    if scales is None:
        scales = [value for name, value in call.arguments.items() if name.startswith("scales")]
    return [*scales, *[None] * len(_sizes(call))][: len(_sizes(call))]


def _scaled_by_sizes(call: OpCall) -> bool:
    """Whether results are where the sizes say: not at corners, and by no scale that is not the ratio of sizes."""
    if call.arguments.get("align_corners") or any(0 in (size, out) for _, size, out in _sizes(call)):
        return False
    pairs = zip(_scales(call), _sizes(call), strict=True)
    return all(scale is None or scale * size == out for scale, (_, size, out) in pairs)


@dataclass(frozen=True)
class Resizing:
    """One kind: along each dim a result takes `before` elements in front of its place, and `after` behind it."""

    mode: str
    kernel: str
    before: int = 0
    after: int = 0
    antialias: bool = False

    @property
    def rule(self) -> Rule:
        """By a kernel that is told sizes only where parts become whole results of it, else by places."""
        told, placed = windowed(self._kernel_windows, self._by_kernel), windowed(self._windows, self._by_places)
        whole = labelled(lambda call: leading(len(call.out.shape) - 2)(call))

        def rule(call: OpCall) -> Rule:
            if any(0 in (size, out) for _, size, out in _sizes(call)) or self._is_unsure(call):
                return whole
            return told if self._is_told(call) else placed

        return Rule.by(rule)

    def _is_unsure(self, call: OpCall) -> bool:
        """Whether devices read different elements: some repeat what becomes twice as long, whatever the scale."""
        short = any(out in (size, 2 * size) for _, size, out in _sizes(call))
        return self.mode == "nearest" and short and not _scaled_by_sizes(call)

    def _is_told(self, call: OpCall) -> bool:
        """Whether a kernel that is told sizes only makes what ranks make: some results of parts are dropped."""
        if self.mode.startswith("nearest") or not _scaled_by_sizes(call):
            return False
        return all(window.unit <= FINEST for window in self._kernel_windows(call).values())

    def _kernel_windows(self, call: OpCall) -> Windows:
        return {dim: self._kernel_window(size, out) for dim, size, out in _sizes(call)}

    def _kernel_window(self, size: int, out: int) -> Window:
        if self.antialias:
            return Window.around(size, out, self.after)
        return Window.tapped(size, out, self.before, self.after)

    def _by_kernel(self, call: OpCall, held: list[Held]) -> LocalCall:
        used, sizes, kept = zip(*map(_placed, held), strict=True)
        options = {"mode": self.kernel, "antialias": self.antialias}
        return window_ops.cut_resize, (_operand(call), used, sizes, kept), options

    def _step(self, size: int, out: int, scale: float | None, *, corners: bool) -> float:
        """What lies between two results, as kernels reckon it."""
        if corners:
            return (size - 1) / (out - 1) if out > 1 else 0.0
        if self.mode.startswith("nearest"):
            return float(np.float32(1 / scale) if scale else np.float32(size) / np.float32(out))
        return 1 / scale if scale else size / out

    def _window(self, size: int, out: int, scale: float | None, *, corners: bool) -> Window:
        step = Fraction(self._step(size, out, scale, corners=corners))
        if corners and not self.antialias:
            exact = Fraction(size - 1, max(out - 1, 1)) if out > 1 else Fraction(0)
            return Window.placed(size, out, exact, Fraction(0), self.before, self.after)
        if self.mode.startswith("nearest"):  # one more on both sides for single precision
            return Window.placed(size, out, step, step / 2 if "exact" in self.mode else Fraction(0), 1, 1)
        step = step if scale or corners else Fraction(size, out)
        if self.antialias:
            reach = math.ceil(self.after * max(step, Fraction(1))) + 1
            return Window.placed(size, out, step, step / 2, reach, reach)
        return Window.placed(size, out, step, (step - 1) / 2, self.before, self.after)

    def _windows(self, call: OpCall) -> Windows:
        corners, sizes = bool(call.arguments.get("align_corners")), zip(_sizes(call), _scales(call), strict=True)
        return {dim: self._window(size, out, scale, corners=corners) for (dim, size, out), scale in sizes}

    def _by_places(self, call: OpCall, held: list[Held]) -> LocalCall:
        corners = bool(call.arguments.get("align_corners"))
        steps = [
            self._step(size, out, scale, corners=corners)
            for (_, size, out), scale in zip(_sizes(call), _scales(call), strict=True)
        ]
        places = [placed_in(one, step) for one, step in zip(held, steps, strict=True)]
        return resampled, (_operand(call), places, self.mode, corners, self.antialias), {}


def placed_in(one: Held, step: float = 0.0) -> Place:
    """What `resampled` is told of a dim."""
    return one.window.size, one.window.out, step, one.held.runs[0][0], one.made.runs[0][0], one.made.size


def _operand(call: OpCall) -> object:
    return call.arguments["self" if "self" in call.arguments else "input"]


def _placed(one: Held) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """What to take of what is held, how long it becomes, and what to keep of that."""
    window, (start, length) = one.window, one.used
    every = window.out // (window.size // window.unit)
    first = (one.held.runs[0][0] + start) // window.unit * every
    return (start, length), length // window.unit * every, (one.made.runs[0][0] - first, one.made.size)


def _repeated(mode: str) -> Rule:
    """Resizing to the nearest: by repetition where each rank then makes the results for what it holds."""
    placed = Resizing(mode, mode).rule
    return Rule.by(lambda call: ENLARGED if len(_factors(call)) == len(_sizes(call)) else placed)


ENLARGED = _enlarged(2, _factors)
LINEAR = {name: Resizing("linear", name, 0, 1).rule for name in ("linear", "bilinear", "trilinear")}

RULES = {
    **rules_of(_repeated("nearest"), *(getattr(aten, f"upsample_nearest{n}d") for n in (1, 2, 3))),
    **rules_of(_repeated("nearest-exact"), *(getattr(aten, f"_upsample_nearest_exact{n}d") for n in (1, 2, 3))),
    **rules_of(LINEAR["linear"], aten.upsample_linear1d),
    **rules_of(LINEAR["bilinear"], aten.upsample_bilinear2d),
    **rules_of(LINEAR["trilinear"], aten.upsample_trilinear3d),
    **rules_of(Resizing("cubic", "bicubic", 1, 2).rule, aten.upsample_bicubic2d),
    **rules_of(Resizing("linear", "bilinear", 1, 1, antialias=True).rule, aten._upsample_bilinear2d_aa),
    **rules_of(Resizing("cubic", "bicubic", 2, 2, antialias=True).rule, aten._upsample_bicubic2d_aa),
    **rules_of(_enlarged(-3, _shuffled), aten.pixel_shuffle),
    **rules_of(verified(Rule(_unshuffle, _unshuffle_demand)), aten.pixel_unshuffle),
}

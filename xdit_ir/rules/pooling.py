"""Pooling over windows, and over equal blocks; batch and channels stay free."""

from __future__ import annotations

import torch

from xdit_ir.ir import window_ops
from xdit_ir.ir.resampling import resampled
from xdit_ir.rules.base import LocalCall, OpCall, Rule, rules_of
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import labelled
from xdit_ir.rules.resizing import placed_in
from xdit_ir.rules.sliding import Held, Windows, per_dim, windowed
from xdit_ir.rules.windows import leading

aten = torch.ops.aten


def _pooled(call: OpCall, spatial: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation along each spatial dim."""
    given = call.arguments
    kernel = per_dim(given["kernel_size"], spatial)
    stride, dilation = given.get("stride"), given.get("dilation", 1)
    return (
        kernel,
        per_dim(stride, spatial) if stride else kernel,
        per_dim(given["padding"], spatial),
        per_dim(dilation, spatial),
    )


def _windows(call: OpCall, spatial: int) -> Windows:
    kernel, stride, padding, dilation = _pooled(call, spatial)
    first = len(call.out.shape) - spatial
    found = {}
    for place, dim in enumerate(range(first, first + spatial)):
        reach = (kernel[place] - 1) * dilation[place] + 1
        shapes = call.specs[0].shape[dim], call.out.shape[dim]
        found[dim] = Window.sliding(*shapes, stride[place], padding[place], reach)
    return found


def _kind(call: OpCall, spatial: int) -> str:
    if "count_include_pad" not in call.arguments:
        return "max"
    if not call.arguments["count_include_pad"]:
        return "inner"
    unpadded = not any(_pooled(call, spatial)[2])  # what a last window reaches over is not counted then
    return "inner" if unpadded and _overshoots(call, spatial) else "avg"


def _overshoots(call: OpCall, spatial: int) -> bool:
    """Whether the last window reaches over the padding, which a mean does not count."""
    padding = _pooled(call, spatial)[2]
    windows = _windows(call, spatial).values()
    return any(one.stop(one.out - 1) > one.size + pad for one, pad in zip(windows, padding, strict=True))


def _pool(spatial: int) -> Rule:
    def local(call: OpCall, held: list[Held]) -> LocalCall:
        kernel, stride, _, dilation = _pooled(call, spatial)
        padding, divisor = [one.border for one in held], call.arguments.get("divisor_override")
        return (
            window_ops.padded_pool,
            (call.arguments["self"], _kind(call, spatial), kernel, stride, padding, dilation, divisor),
            {},
        )

    inside, whole = windowed(lambda call: _windows(call, spatial), local), labelled(leading(spatial))
    return Rule.by(lambda call: whole if _kind(call, spatial) == "avg" and _overshoots(call, spatial) else inside)


def _blocks(call: OpCall, spatial: int) -> list[int]:
    """How many elements make one result along each spatial dim; 0 where that is no whole number."""
    pairs = zip(call.specs[0].shape[-spatial:], call.out.shape[-spatial:], strict=True)
    return [size // out if out and size % out == 0 else 0 for size, out in pairs]


def _adaptive(spatial: int) -> Rule:
    def windows(call: OpCall) -> Windows:
        first = len(call.out.shape) - spatial
        dims = enumerate(_blocks(call, spatial), first)
        return {dim: Window.sliding(by * call.out.shape[dim], call.out.shape[dim], by, 0, by) for dim, by in dims}

    def local(call: OpCall, held: list[Held]) -> LocalCall:
        blocks, ones = _blocks(call, spatial), [1] * spatial
        padding = [one.border for one in held]
        return window_ops.padded_pool, (call.arguments["self"], "avg", blocks, blocks, padding, ones, None), {}

    def places(call: OpCall) -> Windows:
        dims = range(len(call.out.shape) - spatial, len(call.out.shape))
        return {dim: Window.adaptive(call.specs[0].shape[dim], call.out.shape[dim]) for dim in dims}

    def placed(call: OpCall, held: list[Held]) -> LocalCall:
        return resampled, (call.arguments["self"], [placed_in(one) for one in held], "mean", False, False), {}

    even, uneven = windowed(windows, local), windowed(places, placed)
    return Rule.by(lambda call: even if all(_blocks(call, spatial)) else uneven)


RULES = {
    **{
        packet: _pool(n) for n in (1, 2, 3) for packet in (getattr(aten, f"{kind}_pool{n}d") for kind in ("avg", "max"))
    },
    **{getattr(aten, f"adaptive_avg_pool{n}d"): _adaptive(n) for n in (1, 2, 3)},
    **{getattr(aten, f"adaptive_max_pool{n}d"): labelled(leading(n)) for n in (1, 2, 3)},
    **rules_of(_adaptive(2), aten._adaptive_avg_pool2d),
    **rules_of(_adaptive(3), aten._adaptive_avg_pool3d),
    **rules_of(labelled(leading(2)), aten.max_pool2d_with_indices),
    **rules_of(labelled(leading(3)), aten.max_pool3d_with_indices),
}

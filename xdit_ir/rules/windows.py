"""Operators on images of which each result may need all rows and columns; batch and channels stay free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from xdit_ir.ir.window_ops import overlap_add, window_energy
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, rules_of, same_call
from xdit_ir.rules.intervals import Window
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain, unary
from xdit_ir.rules.sliding import Held, Windows, windowed

aten = torch.ops.aten


def leading(spatial: int, channels: bool = True) -> Callable[[OpCall], Labels]:
    """The last `spatial` dims must be whole, and the channels before them unless each is treated alone."""
    behind = spatial if channels else spatial + 1

    def describe(call: OpCall) -> Labels:
        slot = call.slots[0]
        names = plain(call.specs[0], range(-behind, 0))
        free = names[: len(names) - behind]
        results = ((*free, *(None,) * (len(spec.shape) - len(free))) for spec in call.results)
        return by_argument(call, *results, **{slot: names})

    return describe


def _sampled(call: OpCall) -> Labels:
    """`grid_sampler`: per sample; channels are free in the image, positions in the grid."""
    ndim = len(call.specs[0].shape)
    places = tuple(("place", d) for d in range(ndim - 2))
    return by_argument(call, (0, 1, *places), input=(0, 1, *(None,) * (ndim - 2)), grid=(0, *places, None))


def _sampled_anywhere(call: OpCall) -> OpSharding:
    """Each rank its positions, for which the image is gathered, and which the report then names."""
    divided = any(dim is not None for dim in call.layouts[0].dims[2:])
    return replace(SAMPLED.forward(call), fallback="reads the image at any place" if divided else "")


def _overlaps(call: OpCall) -> Windows:
    """How sums of windows go along rows and columns."""
    given, first = call.arguments, len(call.out.shape) - 2
    found = {}
    steps = zip(given["kernel"], given["stride"], given["dilation"], given["kept"], strict=True)
    for dim, (kernel, stride, dilation, (start, length)) in enumerate(steps, first):
        reach = (kernel - 1) * dilation + 1
        found[dim] = Window.transposed(call.specs[0].shape[dim], length, stride, start, reach)
    return found


def _overlap_add(call: OpCall, held: list[Held]) -> LocalCall:
    """The windows that a rank has, and of their sum what it makes."""
    given = call.arguments
    steps = zip(held, given["stride"], given["kept"], strict=True)
    kept = [one.kept(stride, start) for one, stride, (start, _) in steps]
    return same_call(call, kept=kept)


SAMPLED = labelled(_sampled)

RULES = {
    **rules_of(labelled(lambda call: by_argument(call, (None,) * 4)), window_energy),
    **rules_of(windowed(_overlaps, _overlap_add, mixes=True), overlap_add),
    **rules_of(labelled(lambda call: unary(call, [1])), aten.channel_shuffle),
    **rules_of(labelled(leading(2, channels=False)), aten.im2col),
    **rules_of(labelled(leading(1, channels=False)), aten.col2im),
    **rules_of(Rule(_sampled_anywhere, SAMPLED.demand), aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d),
}

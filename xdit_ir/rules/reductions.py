"""Reductions and normalisations: local along undivided dims; sums along divided ones stay partial."""

from __future__ import annotations

import torch

from xdit_ir.layout import Layout
from xdit_ir.ops import scaled_sum
from xdit_ir.rules.base import Call, LocalCall, Rule, Ruling, dims_whole, rules_of

aten = torch.ops.aten


def _norm(call: Call) -> Ruling:
    """layer_norm, rms_norm: the trailing `normalized_shape` dims must be whole."""
    count = len(call.arguments["normalized_shape"])
    layout = dims_whole(call, 0, [-1 - i for i in range(count)])
    return Ruling((layout, *_weights(call)), layout)


def _norm_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    count = len(call.arguments["normalized_shape"])
    return None if any(wanted.dims[-count:]) else (wanted, *_weights(call))


def _weights(call: Call) -> tuple[Layout, ...]:
    return tuple(Layout.whole(len(spec.shape)) for spec in call.specs[1:])


def _group_norm(call: Call) -> Ruling:
    layout = dims_whole(call, 0, range(1, len(call.out.shape)))
    return Ruling((layout, *_weights(call)), layout)


def _group_norm_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return None if any(wanted.dims[1:]) else (wanted, *_weights(call))


def _dims(call: Call) -> list[int]:
    arguments, ndim = call.arguments, len(call.specs[0].shape)
    dims = arguments.get("dim")
    if dims is None or dims == []:
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _along(call: Call) -> Ruling:
    """Operators that keep the shape and mix along `dim`: softmax, cumsum, ..."""
    layout = dims_whole(call, 0, _dims(call))
    return Ruling((layout,), layout)


def _along_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return None if any(wanted.dims[d] for d in _dims(call)) else (wanted,)


def _reduced(call: Call, layout: Layout, partial: frozenset[str]) -> Layout:
    dims = _dims(call)
    if len(layout.dims) == len(call.out.shape):
        kept = tuple(None if d in dims else p for d, p in enumerate(layout.dims))
    else:
        kept = tuple(p for d, p in enumerate(layout.dims) if d not in dims)
    return Layout(kept, partial)


def _reduce(call: Call) -> Ruling:
    """amax, var, ...: reduced dims must be whole."""
    layout = dims_whole(call, 0, _dims(call))
    return Ruling((layout,), _reduced(call, layout, frozenset()))


def _sum(call: Call) -> Ruling:
    """A sum over divided dims is partial."""
    layout = call.layouts[0].summed()
    partial = frozenset().union(*(call.varies(layout.dims[d]) for d in _dims(call)))
    return Ruling((layout,), _reduced(call, layout, partial))


def _mean(call: Call) -> Ruling:
    """A mean over divided dims is a partial sum of parts, each divided by the global count."""
    ruling = _sum(call)
    if not isinstance(ruling.outputs, Layout) or not ruling.outputs.partial:
        return ruling
    count = 1
    for d in _dims(call):
        count *= call.specs[0].shape[d]
    arguments = call.arguments

    def local(rank: int) -> LocalCall:
        return scaled_sum, (arguments["self"], tuple(_dims(call)), arguments.get("keepdim", False), count), {}

    return Ruling(ruling.inputs, ruling.outputs, local)


RULES = {
    **rules_of(Rule(_norm, _norm_demand), aten.layer_norm, aten.rms_norm),
    **rules_of(Rule(_group_norm, _group_norm_demand), aten.group_norm),
    **rules_of(
        Rule(_along, _along_demand),
        aten.softmax,
        aten._softmax,
        aten.log_softmax,
        aten._log_softmax,
        aten.cumsum,
        aten.cumprod,
    ),
    **rules_of(Rule(_sum), aten.sum),
    **rules_of(Rule(_mean), aten.mean),
    **rules_of(
        Rule(_reduce),
        aten.amax,
        aten.amin,
        aten.any,
        aten.all,
        aten.var,
        aten.std,
        aten.prod,
        aten.logsumexp,
        aten.argmax,
        aten.argmin,
        aten.linalg_vector_norm,
    ),
}

"""Writes through views: what the viewed tensor becomes when a part of it is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from xdit_ir.capture.operators import IDENTITY, aten
from xdit_ir.capture.values import View

Call = Callable[..., fx.Node]


def scatter(view: View, base: fx.Node, written: fx.Node, call: Call) -> fx.Node | None:
    """The view's source, in `base`, after the viewed part became `written`, or None if nothing does it."""
    if view.func in IDENTITY:
        return written
    inverse = _INVERSES.get(view.func)
    return None if inverse is None else inverse(view, base, written, call)


def _argument(view: View, position: int, name: str, default: Any) -> Any:
    return view.args[position] if position < len(view.args) else view.kwargs.get(name, default)


def _slice(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    bounds = [_argument(view, i + 1, n, d) for i, (n, d) in enumerate(_SLICE)]
    return call(aten.slice_scatter.default, base, new, *bounds)


def _select(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    return call(aten.select_scatter.default, base, new, view.args[1], view.args[2])


def _permute(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    dims = [dim % len(view.args[1]) for dim in view.args[1]]
    return call(aten.permute.default, new, [dims.index(position) for position in range(len(dims))])


def _transpose(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    return call(aten.transpose.int, new, view.args[1], view.args[2])


def _reshape(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    return call(aten.reshape.default, new, list(view.source.shape))


def _split(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    dim, index = _argument(view, 2, "dim", 0), view.index or 0
    start = sum(piece.shape[dim] for piece in view.pieces[:index])
    return call(aten.slice_scatter.default, base, new, dim, start, start + view.result.shape[dim], 1)


def _unbind(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    return call(aten.select_scatter.default, base, new, _argument(view, 1, "dim", 0), view.index)


def _diagonal(view: View, base: fx.Node, new: fx.Node, call: Call) -> fx.Node:
    places = [_argument(view, i + 1, n, d) for i, (n, d) in enumerate((("offset", 0), ("dim1", 0), ("dim2", 1)))]
    return call(aten.diagonal_scatter.default, base, new, *places)


def _unary(target: Any) -> Callable[[View, fx.Node, fx.Node, Call], fx.Node]:
    return lambda view, base, new, call: call(target, new)


_SLICE = (("dim", 0), ("start", None), ("end", None), ("step", 1))
_INVERSES: dict[Any, Callable[[View, fx.Node, fx.Node, Call], fx.Node]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _unary(aten.t.default),
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.diagonal.default: _diagonal,
    aten.view_as_real.default: _unary(aten.view_as_complex.default),
    aten.view_as_complex.default: _unary(aten.view_as_real.default),
}

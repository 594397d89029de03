"""What a softmax is taken of, and what it weights: patterns around it, from its operand up and from its result down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments, operands
from xdit_ir.ir.program import SPEC
from xdit_ir.passes.products import Product, product_of
from xdit_ir.passes.views import PERMUTES, VIEWS, order_of

aten = torch.ops.aten
SAME = (aten._to_copy.default, aten.clone.default, aten.dropout.default)
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
SCALES = (aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS)
# Where among the arguments the scores, the condition and the value are, and whether scores are hidden where it is true.
FILLS: dict[Any, tuple[int, int, int, bool]] = {
    aten.masked_fill.Scalar: (0, 1, 2, True),
    aten.masked_fill.Tensor: (0, 1, 2, True),
    aten.where.ScalarOther: (1, 0, 2, False),
    aten.where.self: (1, 0, 2, False),
    aten.where.ScalarSelf: (2, 0, 1, True),
}
Fill = tuple[fx.Node, bool, float]


@dataclass
class Scores:
    """What is under a softmax: a product times `scale`, plus masks times their factors, some filled with a value.

    A fill is the condition, whether scores are hidden where it is true, and the value.
    """

    product: Product
    scale: float = 1.0
    masks: list[tuple[fx.Node, float]] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)


@dataclass(frozen=True)
class _Layer:
    """What one operator makes of `scores`: scaled ones, or with a mask added, or some filled."""

    scores: Any
    scale: float = 1.0
    mask: fx.Node | None = None
    fill: Fill | None = None


def scores_of(softmax: fx.Node) -> Scores | None:
    """Take off layer by layer from a softmax over the last dim up to the product that it is taken of."""
    shape = softmax.meta[SPEC].shape
    if not shape or bound_arguments(softmax)["dim"] % len(shape) != len(shape) - 1:
        return None
    scale: float = 1.0
    masks: list[tuple[fx.Node, float]] = []
    fills: list[Fill] = []
    node: Any = softmax.args[0]
    while (layer := _layer(node)) is not None:
        if layer.mask is not None:
            masks.append((layer.mask, scale))
        if layer.fill is not None:
            condition, hides, value = layer.fill
            fills.append((condition, hides, value * scale))
        scale, node = scale * layer.scale, layer.scores
    product = _product(node)
    found = None if product is None else _as_keys(product)
    if found is not None and found.added is not None:
        masks.append((found.added, scale * found.beta))
    return None if found is None else Scores(found, scale * found.alpha, masks, fills)


def _product(node: Any) -> Product | None:
    return product_of(node) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _layer(node: Any) -> _Layer | None:
    """The outermost layer over a product; None where there is none, or none that is known."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or product_of(node) is not None:
        return None
    peel = LAYERS.get(node.target)
    return None if peel is None else peel(node)


def _unchanged(node: fx.Node) -> _Layer | None:
    return _Layer(node.args[0]) if _passes_through(node) else None


def _passes_through(node: fx.Node) -> bool:
    """Whether a node leaves every matrix of the last two dims alone."""
    if node.target in SAME:
        return node.target is not aten.dropout.default or not (node.args[1] and node.args[2])
    return node.target in VIEWS and node.meta[SPEC].shape[-2:] == operands(node)[0].meta[SPEC].shape[-2:]


def _turns(node: fx.Node) -> bool:
    """Whether a node transposes every matrix of the last two dims."""
    if node.target not in PERMUTES:
        return False
    ndim = len(node.meta[SPEC].shape)
    return order_of(node, ndim) == [*range(ndim - 2), ndim - 1, ndim - 2]


def _scaled(node: fx.Node) -> _Layer | None:
    factor: Any = node.args[1]
    if not isinstance(factor, int | float) or factor <= 0:
        return None
    return _Layer(node.args[0], 1 / factor if node.target in DIVISIONS else factor)


def _masked(node: fx.Node) -> _Layer | None:
    """The summand that leads to a product is the scores."""
    if node.kwargs or not all(isinstance(side, fx.Node) for side in node.args):
        return None
    left, right = operands(node)
    for scores, mask in ((left, right), (right, left)):
        if scores.meta[SPEC].shape == node.meta[SPEC].shape and _leads_to_product(scores):
            return _Layer(scores, mask=mask)
    return None


def _leads_to_product(node: Any) -> bool:
    while (layer := _layer(node)) is not None:
        node = layer.scores
    return _product(node) is not None


def _filled(node: fx.Node) -> _Layer | None:
    """Where adding the value leaves nothing of a score, in the score's precision."""
    *places, hides = FILLS[node.target]
    scores, condition, value = (node.args[place] for place in places)
    if isinstance(value, fx.Node):
        value = bound_arguments(value).get("fill_value") if value.target is aten.full.default else None
    if not isinstance(value, int | float) or not isinstance(scores, fx.Node) or not isinstance(condition, fx.Node):
        return None
    spec = node.meta[SPEC]
    gone = value == -math.inf or -value * torch.finfo(spec.dtype).eps > 100
    same = scores.meta[SPEC].shape == spec.shape
    return _Layer(scores, fill=(condition, hides, float(value))) if gone and same else None


LAYERS: dict[Any, Callable[[fx.Node], _Layer | None]] = {
    **dict.fromkeys((*SAME, *VIEWS), _unchanged),
    **dict.fromkeys(SCALES, _scaled),
    aten.add.Tensor: _masked,
    **dict.fromkeys(FILLS, _filled),
}


def _as_keys(product: Product) -> Product | None:
    """The product with queries left and keys right, if it is one of queries `[..., n, d]` and keys `[..., m, d]`."""
    if len(product.out) < 2:
        return None
    rows, columns = product.out[-2:]
    if columns in product.names[0]:
        product = product.turned()
    left, right = product.names
    inner = [name for name in left if name not in product.out]
    if rows in right or rows not in left or columns in left or columns not in right:
        return None
    batch = set(product.out[:-2])
    ours = {*batch, rows, columns, *inner}
    return product if len(inner) == 1 and inner[0] in right and ours.issuperset({*left, *right}) else None


def weighted_by(softmax: fx.Node) -> Product | None:
    """The product of the softmax (left) and values `[..., m, e]` (right), if that is its only use; it may be turned on
    the way, as where values stand first: labels are those of its own dims."""
    node = softmax
    straight: fx.Node | None = None  # where they were transposed, what was
    while len(node.users) == 1:
        user = next(iter(node.users))
        product = product_of(user) if user.op == "call_function" else None
        if product is not None:
            if product.right is node:
                product = product.turned()
            if product.left is not node:
                return None
            product = product if straight is None else _turned_back(product, straight)
            return product if product is not None and _is_weighted(product) else None
        if user.op != "call_function" or not (_passes_through(user) or _turns(user)):
            return None
        if _turns(user):
            straight = node if straight is None else None
        node = user
    return None


def _turned_back(product: Product, straight: fx.Node) -> Product | None:
    """The product with its left side as it was before its matrices were transposed; None where others than these are
    views of each other."""
    *batch, columns, rows = product.names[0]
    if straight.meta[SPEC].shape[:-2] != product.left.meta[SPEC].shape[:-2]:
        return None
    return replace(product, left=straight, names=((*batch, rows, columns), product.names[1]))


def _is_weighted(product: Product) -> bool:
    left, right = product.names
    rows, columns = left[-2:]
    features = [name for name in right if name not in left]
    batch = list(left[:-2])
    plain = columns in right and columns not in product.out and rows not in right and len(features) == 1
    kept = sorted(map(str, product.out)) == sorted(map(str, (*batch, rows, *features)))
    return plain and kept and product.alpha == 1 and product.added is None and product.right is not product.left

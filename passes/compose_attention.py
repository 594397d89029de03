"""`compose-attention`: products around a softmax become one `attention`, which the later passes know how to divide."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import bound_arguments, map_graphs, operands, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.products import Product, product_of
from xdit_ir.passes.views import VIEWS
from xdit_ir.rules.labels import Names

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
SAME = (aten._to_copy.default, aten.clone.default, aten.dropout.default)
DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
SCALES = (aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ComposeAttention:
    """Find softmax(scale * q k^T + mask) v, written with matmul, bmm, baddbmm or einsum, with casts, fills and views
    of the leading dims in between. Numerics: reassociated.

    A filled score is written as one from which the filling is subtracted, and only where nothing is left of the score
    in its own precision: rows in which every key is hidden then come out as before.
    """

    name: str = "compose-attention"

    def apply(self, program: Program) -> Program:
        """The program with such attentions as single operators."""
        return map_graphs(program, _compose)


def _compose(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in SOFTMAXES:
            continue
        scores, weighted = _scores(node), _weighted(node)
        if scores is not None and weighted is not None:
            _write(graph, scores, weighted)
    remove_dead(graph)


@dataclass
class _Scores:
    """What is under a softmax: a product times `scale`, plus masks times their factors, some filled with a value."""

    product: Product
    scale: float = 1.0
    masks: list[tuple[fx.Node, float]] = field(default_factory=list)
    fills: list[tuple[fx.Node, bool, float]] = field(default_factory=list)


def _scores(softmax: fx.Node) -> _Scores | None:
    """Walk from a softmax over the last dim up to the product that it is taken of."""
    shape = softmax.meta[SPEC].shape
    if not shape or bound_arguments(softmax)["dim"] % len(shape) != len(shape) - 1:
        return None
    scale: float = 1.0
    masks: list[tuple[fx.Node, float]] = []
    fills: list[tuple[fx.Node, bool, float]] = []
    node: Any = softmax.args[0]
    while isinstance(node, fx.Node) and len(node.users) == 1:
        product = product_of(node)
        if product is not None:
            found = _as_keys(product)
            if found is None:
                return None
            if found.added is not None:
                masks.append((found.added, scale * found.beta))
            return _Scores(found, scale * found.alpha, masks, fills)
        if _passes_through(node):
            node = node.args[0]
        elif node.target in SCALES and isinstance(node.args[1], int | float) and node.args[1] > 0:
            scale = scale / node.args[1] if node.target in DIVISIONS else scale * node.args[1]
            node = node.args[0]
        elif node.target is aten.add.Tensor and (summand := _summand(node)) is not None:
            node, mask = summand
            masks.append((mask, scale))
        elif node.target in FILLS and (fill := FILLS[node.target](node)) is not None and _hides(fill[3], node):
            node, hidden, value = fill[0], fill[1:3], fill[3]
            fills.append((*hidden, value * scale))
        else:
            return None
    return None


def _passes_through(node: fx.Node) -> bool:
    """Whether a node leaves every matrix of the last two dims alone."""
    if node.target in SAME:
        return node.target is not aten.dropout.default or not (node.args[1] and node.args[2])
    return node.target in VIEWS and node.meta[SPEC].shape[-2:] == operands(node)[0].meta[SPEC].shape[-2:]


def _summand(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The scores and what is added to them: the summand that leads to a product is the scores."""
    if node.kwargs or not all(isinstance(side, fx.Node) for side in node.args):
        return None
    left, right = operands(node)
    shape = node.meta[SPEC].shape
    for scores, mask in ((left, right), (right, left)):
        if scores.meta[SPEC].shape == shape and _leads_to_product(scores):
            return scores, mask
    return None


def _leads_to_product(node: fx.Node) -> bool:
    while len(node.users) == 1 and node.op == "call_function":
        if product_of(node) is not None:
            return True
        if not _passes_through(node) and node.target not in (*SCALES, *FILLS, aten.add.Tensor):
            return False
        sources = operands(node)
        node = sources[1] if node.target is aten.where.ScalarSelf else sources[0]
        if node.target is aten.where.ScalarOther:
            node = sources[1]
    return False


# The scores, the condition, whether scores are hidden where it is true, and the value.
_Fill = tuple[fx.Node, fx.Node, bool, float]


def _masked_fill(node: fx.Node) -> _Fill | None:
    scores, mask, value = node.args[:3]
    return _filled(node, scores, mask, True, value)


def _where(node: fx.Node) -> _Fill | None:
    condition, scores, value = node.args[:3]
    return _filled(node, scores, condition, False, value)


def _where_hidden(node: fx.Node) -> _Fill | None:
    condition, value, scores = node.args[:3]
    return _filled(node, scores, condition, True, value)


def _filled(node: fx.Node, scores: Any, condition: Any, hides: bool, value: Any) -> _Fill | None:
    if isinstance(value, fx.Node):
        value = bound_arguments(value).get("fill_value") if value.target is aten.full.default else None
    if not isinstance(value, int | float) or not isinstance(scores, fx.Node):
        return None
    same = scores.meta[SPEC].shape == node.meta[SPEC].shape
    return (scores, condition, hides, float(value)) if same else None


FILLS: dict[Any, Callable[[fx.Node], _Fill | None]] = {
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.ScalarOther: _where,
    aten.where.self: _where,
    aten.where.ScalarSelf: _where_hidden,
}


def _hides(value: float, node: fx.Node) -> bool:
    """Whether adding the value leaves nothing of a score, in the score's precision."""
    return value == -math.inf or -value * torch.finfo(node.meta[SPEC].dtype).eps > 100


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


def _weighted(softmax: fx.Node) -> Product | None:
    """The product of the softmax (left) and values `[..., m, e]` (right), if that is its only use."""
    node = softmax
    while len(node.users) == 1:
        user = next(iter(node.users))
        product = product_of(user) if user.op == "call_function" else None
        if product is not None:
            if product.right is node:
                product = product.turned()
            return product if product.left is node and _is_weighted(product) else None
        if user.op != "call_function" or not _passes_through(user):
            return None
        node = user
    return None


def _is_weighted(product: Product) -> bool:
    left, right = product.names
    rows, columns = left[-2:]
    features = [name for name in right if name not in left]
    batch = list(left[:-2])
    plain = columns in right and columns not in product.out and rows not in right and len(features) == 1
    kept = sorted(map(str, product.out)) == sorted(map(str, (*batch, rows, *features)))
    return plain and kept and product.alpha == 1 and product.added is None and product.right is not product.left


def _arranged(emitter: Emitter, x: fx.Node, names: Names, wanted: Names, sizes: dict[Any, int]) -> fx.Node:
    """The value with its dims in the wanted order, broadcast where it lacks one."""
    present = [name for name in wanted if name in names]
    x = emitter.permute(x, [names.index(name) for name in present])
    own = iter(x.meta[SPEC].shape)
    x = emitter.reshape(x, [next(own) if name in names else 1 for name in wanted])
    return emitter.expand(x, [sizes[name] for name in wanted])


def _sizes(product: Product) -> dict[Any, int]:
    sizes: dict[Any, int] = {}
    for side, names in zip((product.left, product.right), product.names, strict=True):
        for name, size in zip(names, side.meta[SPEC].shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 0))
    return sizes


def _write(graph: fx.Graph, scores: _Scores, weighted: Product) -> None:
    first, emitter = scores.product, Emitter(graph, weighted.node)
    sizes, lead = _sizes(first), first.out[:-2]
    rows, columns = first.out[-2:]
    (inner,) = (name for name in first.names[0] if name not in first.out)
    q = _arranged(emitter, first.left, first.names[0], (*lead, rows, inner), sizes)
    k = _arranged(emitter, first.right, first.names[1], (*lead, columns, inner), sizes)
    sizes, (*after, rows, columns) = _sizes(weighted), weighted.names[0]
    (features,) = (name for name in weighted.names[1] if name not in weighted.names[0])
    v = _arranged(emitter, weighted.right, weighted.names[1], (*after, columns, features), sizes)
    leads = [_unmerged(q), *(x.meta[SPEC].shape[:-2] for x in (q, k, v, weighted.left))]
    shape = max(leads, key=len)
    mask = _mask(emitter, scores, shape)
    if mask is False:
        return
    q, k, v = (emitter.reshape(x, (*shape, *x.meta[SPEC].shape[-2:])) for x in (q, k, v))
    out = _attend(emitter, q, k, v, mask, scores.scale)
    out = emitter.reshape(out, [sizes[name] for name in (*after, rows, features)])
    order = [(*after, rows, features).index(name) for name in weighted.out]
    weighted.node.replace_all_uses_with(emitter.permute(out, order))


def _unmerged(q: fx.Node) -> Shape:
    """The leading dims before they were joined into one, if that happened just before."""
    shape: Shape = q.meta[SPEC].shape
    if q.target not in VIEWS:
        return shape[:-2]
    before: Shape = operands(q)[0].meta[SPEC].shape
    return before[:-2] if before[-2:] == shape[-2:] else shape[:-2]


def _mask(emitter: Emitter, scores: _Scores, lead: Shape) -> fx.Node | bool | None:
    """The sum of everything added to the scores, for leading dims `lead`; False where it does not fit them."""
    terms = [_times(emitter, mask, factor) for mask, factor in scores.masks]
    terms += [_hidden(emitter, *fill) for fill in scores.fills]
    fitted = [_fitted(emitter, term, lead) for term in terms]
    if any(term is None for term in fitted):
        return False
    present = [term for term in fitted if term is not None]
    return functools.reduce(emitter.plus, present) if present else None


def _times(emitter: Emitter, mask: fx.Node, factor: float) -> fx.Node:
    spec = mask.meta[SPEC]
    return mask if factor == 1 else emitter.emit(aten.mul.Tensor, (mask, factor), spec.shape, dtype=spec.dtype)


def _hidden(emitter: Emitter, condition: fx.Node, hides: bool, value: float) -> fx.Node:
    spec, dtype = condition.meta[SPEC], emitter.node.meta[SPEC].dtype
    value = max(value, torch.finfo(dtype).min) if value != -math.inf else value
    zeros = emitter.emit(aten.zeros_like.default, (condition,), spec.shape, kwargs={"dtype": dtype})
    if hides:
        return emitter.emit(aten.masked_fill.Scalar, (zeros, condition, value), spec.shape)
    return emitter.emit(aten.where.ScalarOther, (condition, zeros, value), spec.shape)


def _fitted(emitter: Emitter, mask: fx.Node, lead: Sequence[int]) -> fx.Node | None:
    """The mask with leading dims that broadcast to `lead`; None where they do not."""
    *own, rows, columns = (1, 1, *mask.meta[SPEC].shape)[-max(len(mask.meta[SPEC].shape), 2) :]
    while own and own[0] == 1:
        own = own[1:]
    if len(own) <= len(lead) and all(a in (1, b) for a, b in zip(reversed(own), reversed(lead), strict=False)):
        return emitter.reshape(mask, (*own, rows, columns)) if own else emitter.reshape(mask, (rows, columns))
    return emitter.reshape(mask, (*lead, rows, columns)) if math.prod(own) == math.prod(lead) else None


def _attend(emitter: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | bool | None, scale: float) -> fx.Node:
    dtype = functools.reduce(torch.promote_types, (x.meta[SPEC].dtype for x in (q, k, v)))
    q, k, v = (emitter.cast(x, dtype) for x in (q, k, v))
    kwargs: dict[str, Any] = {"scale": scale}
    if isinstance(mask, fx.Node):
        kwargs["mask"] = mask if mask.meta[SPEC].dtype == torch.float32 else emitter.cast(mask, dtype)
    shape = (*q.meta[SPEC].shape[:-1], v.meta[SPEC].shape[-1])
    out = emitter.emit(ops.attention, (q, k, v), shape, dtype=dtype, kwargs=kwargs, name="attention")
    return emitter.cast(out, emitter.node.meta[SPEC].dtype)

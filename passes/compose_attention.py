"""`compose-attention`: products around a softmax become one `attention`, which the later passes know how to divide."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs, operands, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.products import Product
from xdit_ir.passes.scores import Scores, scores_of, weighted_by
from xdit_ir.passes.views import VIEWS
from xdit_ir.rules.labels import Names

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ComposeAttention:
    """Find softmax(scale * q k^T + mask) v, written with matmul, bmm, baddbmm or einsum, with casts, fills and views
    of the leading dims in between.

    A filled score is written as one from which the filling is subtracted, and only where nothing is left of the score
    in its own precision: rows in which every key is hidden then come out as before.
    """

    name: ClassVar[str] = "compose-attention"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with such attentions as single operators."""
        return map_graphs(program, _compose)


def _compose(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target not in SOFTMAXES:
            continue
        scores, weighted = scores_of(node), weighted_by(node)
        if scores is not None and weighted is not None:
            _write(graph, scores, weighted)
    remove_dead(graph)


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


def _write(graph: fx.Graph, scores: Scores, weighted: Product) -> None:
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


def _mask(emitter: Emitter, scores: Scores, lead: Shape) -> fx.Node | bool | None:
    """The sum of everything added to the scores, for leading dims `lead`; False where it does not fit them."""
    terms = [_times(emitter, mask, factor) for mask, factor in scores.masks]
    terms += [_hidden(emitter, *fill) for fill in scores.fills]
    fitted = [_fitted(emitter, term, lead) for term in terms]
    if any(term is None for term in fitted):
        return False
    present = [term for term in fitted if term is not None]
    return functools.reduce(functools.partial(emitter.emit, aten.add.Tensor), present) if present else None


def _times(emitter: Emitter, mask: fx.Node, factor: float) -> fx.Node:
    return mask if factor == 1 else emitter.emit(aten.mul.Tensor, mask, factor)


def _hidden(emitter: Emitter, condition: fx.Node, hides: bool, value: float) -> fx.Node:
    dtype = emitter.node.meta[SPEC].dtype
    value = max(value, torch.finfo(dtype).min) if value != -math.inf else value
    zeros = emitter.emit(aten.zeros_like.default, condition, dtype=dtype)
    if hides:
        return emitter.emit(aten.masked_fill.Scalar, zeros, condition, value)
    return emitter.emit(aten.where.ScalarOther, condition, zeros, value)


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
    out = emitter.emit(ops.attention, q, k, v, name="attention", **kwargs)
    return emitter.cast(out, emitter.node.meta[SPEC].dtype)

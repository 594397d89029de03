"""Reductions, and operators that mix along a dimension but keep it: sums along divided dims stay partial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.mesh import SEQUENCE
from xdit_ir.ir.program import SPEC
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    as_outputs,
    rules_of,
    without_overlaps,
)
from xdit_ir.rules.labels import Labels, Names, aligned, by_argument, labelled, plain, unary
from xdit_ir.rules.pointwise import POINTWISE
from xdit_ir.rules.running import lengths_of_runs

aten = torch.ops.aten


def _dims(call: OpCall, operand: int = 0) -> list[int]:
    """The dims that `dim` names, not negative; all where it names none."""
    ndim, dims = len(call.specs[operand].shape), call.arguments.get("dim")
    if dims is None or dims == [] or not ndim:
        return list(range(ndim))
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims)]


def _along(call: OpCall) -> Labels:
    """Operators that mix along `dim` and keep the others: softmax, cumprod, sort, topk, ..."""
    dims = _dims(call)
    names = plain(call.specs[0], dims)
    return by_argument(call, *(names for _ in call.results), self=names, prepend=names, append=names)


def _reduced(call: OpCall, names: Names) -> Names:
    """Labels of a result from which `dim` is gone, or where it has length 1."""
    dims = _dims(call)
    if len(names) == len(call.out.shape):
        return tuple(None if d in dims else name for d, name in enumerate(names))
    return tuple(name for d, name in enumerate(names) if d not in dims)


def _reduce(call: OpCall) -> Labels:
    """Operators that reduce `dim`; each label of what is reduced is missing in the result."""
    names = plain(call.specs[0])
    return by_argument(call, *(_reduced(call, names) for _ in call.results), self=names)


def share_of_mean(x: torch.Tensor, dims: Sequence[int], keepdim: bool, count: int) -> torch.Tensor:
    """What a part contributes to a mean over `count` elements: its own mean, weighted. Sums could overflow."""
    own = math.prod(x.shape[dim] for dim in dims)
    return x.mean(tuple(dims), keepdim) * (own / count) if own else x.sum(tuple(dims), keepdim)


def _share_of_mean(call: OpCall, sharding: OpSharding) -> Localize | None:
    """A mean over divided dims is a partial sum of the ranks' weighted means."""
    if not as_layouts(sharding.outputs)[0].partial:
        return None
    dims, arguments = _dims(call), call.arguments
    count = math.prod(call.specs[0].shape[dim] for dim in dims)

    def local(rank: int) -> LocalCall:
        return share_of_mean, (arguments["self"], tuple(dims), arguments.get("keepdim", False), count), {}

    return local


SUM = labelled(_reduce, sums=True)
MEAN = labelled(_reduce, _share_of_mean, sums=True)
REDUCE = labelled(_reduce)


def is_extreme(node: fx.Node) -> bool:
    """Whether it is the one largest or smallest element of a tensor."""
    return node.target in (aten.amax.default, aten.amin.default) and math.prod(node.meta[SPEC].shape) == 1


def combined_dims(given: dict[str, Any]) -> list[int]:
    """The dims that a reduction is over, if a lowering brings together what parts give; else none."""
    spec, dim = given["self"].meta[SPEC], given.get("dim")
    single = dim is None or dim == [] or len(dim) == len(spec.shape)
    if not spec.dtype.is_floating_point or ("correction" not in given and "unbiased" not in given and single):
        return []  # the one largest or smallest element is that of rows
    return [d % len(spec.shape) for d in dim] if dim else list(range(len(spec.shape)))


def _combined(call: OpCall) -> OpSharding:
    """Variances, and the largest elements: of runs of dims that ranks have, one each."""
    layout = without_overlaps(call, call.layouts[0].summed(), combined_dims(call.arguments))
    apart = [
        dim
        for dim in combined_dims(call.arguments)
        if call.dividing_dims(layout.dims[dim]) <= {*SEQUENCE} and lengths_of_runs(call.mesh, layout.dims[dim])
    ]
    astray = [dim for dim in _dims(call) if dim not in apart]
    sharding = SUM.forward(replace(call, layouts=(layout.with_dims(dict.fromkeys(astray)), *call.layouts[1:])))
    return replace(sharding, outputs=as_outputs(call, [one.summed() for one in as_layouts(sharding.outputs)]))


def softmax_dims(given: dict[str, Any]) -> list[int]:
    """The dim along which shares add up to one, if a lowering brings together what parts give; else none."""
    spec = given["self"].meta[SPEC]
    return [given["dim"] % len(spec.shape)] if spec.shape and spec.dtype.is_floating_point else []


def _softmax(call: OpCall) -> OpSharding:
    """Of runs of the dim that ranks have, one each, or of all of it."""
    dims = softmax_dims(call.arguments)
    layout = without_overlaps(call, call.layouts[0].summed(), dims)
    free = [dim for dim in dims if call.dividing_dims(layout.dims[dim]) <= {*SEQUENCE}]
    astray = [dim for dim in _dims(call) if dim not in free or not lengths_of_runs(call.mesh, layout.dims[dim])]
    names = plain(call.out, astray)
    call = replace(call, layouts=(layout, *call.layouts[1:]))
    return labelled(lambda call: by_argument(call, names, self=names)).forward(call)


def _cosine(call: OpCall) -> Labels:
    ndim = max(len(spec.shape) for spec in call.specs)
    dim = call.arguments["dim"] % ndim
    names = [tuple(None if d == dim else d for d in aligned(spec, ndim)) for spec in call.specs]
    return Labels(tuple(names), (tuple(d for d in range(ndim) if d != dim),))


def _glu(call: OpCall) -> Labels:
    return unary(call, [call.arguments["dim"]])


def _triangle(call: OpCall) -> Labels:
    return unary(call, [-2, -1])


RULES = {
    **rules_of(SUM, aten.sum, aten.nansum, aten.count_nonzero),
    **rules_of(Rule.by(lambda call: MEAN if call.out.dtype == call.specs[0].dtype else REDUCE), aten.mean),
    **rules_of(Rule.by(lambda call: POINTWISE if "other" in call.arguments else REDUCE), aten.max, aten.min),
    **rules_of(
        REDUCE,
        aten.aminmax,
        aten.any,
        aten.all,
        aten.prod,
        aten.argmax,
        aten.argmin,
        aten.median,
        aten.kthvalue,
        aten.nanmean,
        aten.linalg_norm,
        aten.norm,
    ),
    **rules_of(
        Rule(_combined, REDUCE.demand),
        *(aten.amax, aten.amin, aten.logsumexp, aten.var, aten.std, aten.var_mean, aten.std_mean),
    ),
    **rules_of(
        Rule(_softmax, labelled(_along).demand), aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax
    ),
    **rules_of(
        labelled(_along),
        aten._safe_softmax,
        aten.cumprod,
        aten.cummax,
        aten.cummin,
        aten.logcumsumexp,
        aten.sort,
        aten.argsort,
        aten.topk,
        aten.diff,
    ),
    **rules_of(labelled(_cosine), aten.cosine_similarity),
    **rules_of(labelled(_glu), aten.glu),
    **rules_of(labelled(_triangle), aten.triu, aten.tril),
}

"""Matrix products and einsum-like contractions: a divided contracted label leaves a partial sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import SPEC
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    rules_of,
    same_call,
    verified,
)
from xdit_ir.rules.labels import Labels, Names, aligned, by_argument, labelled, plain

aten = torch.ops.aten
ROWS, INNER, COLUMNS = "rows", "inner", "columns"
_FEW_ROWS = 16


def _matmul(call: OpCall) -> Labels:
    """Batch labels count from -3 downwards, so that they align."""
    left, right = (len(spec.shape) for spec in call.specs[:2])
    batch_left, batch_right = (tuple(range(-ndim, -2)) for ndim in (left, right))
    a = (*batch_left, ROWS, INNER) if left > 1 else (INNER,)
    b = (*batch_right, INNER, COLUMNS) if right > 1 else (INNER,)
    batch = batch_left if left >= right else batch_right
    out = (*batch, *((ROWS,) if left > 1 else ()), *((COLUMNS,) if right > 1 else ()))
    return Labels((a, b), (out,))


def _linear(call: OpCall) -> Labels:
    batch = tuple(range(-len(call.specs[0].shape), -1))
    features: Names = (COLUMNS,) if len(call.specs[1].shape) > 1 else ()
    bias = features[: len(call.specs[2].shape)] if len(call.specs) > 2 else ()
    return by_argument(call, (*batch, *features), input=(*batch, INNER), weight=(*features, INNER), bias=bias)


def _added(call: OpCall) -> Labels:
    """`addmm` and its kin: an operand that broadcasts to the result, then a product."""
    left, right = call.specs[1:3]
    batch = ("batch",) if len(left.shape) == 3 else ()
    columns = (COLUMNS,) if len(right.shape) > 1 else ()
    kept = batch if len(call.out.shape) == 3 else ()
    out = (*kept, ROWS, *columns)
    added = out[len(out) - len(call.specs[0].shape) :]
    return Labels((added, (*batch, ROWS, INNER), (*batch, INNER, *columns)), (out,))


def _once(argument: str, without: object) -> object:
    """Where the result is partial, only the first rank of each group adds what is not part of the sum."""

    def localize(call: OpCall, sharding: OpSharding) -> Localize | None:
        partial = as_layouts(sharding.outputs)[0].partial
        if not partial or call.arguments[argument] is None:
            return None

        def local(rank: int) -> LocalCall:
            first = call.mesh.index(rank, partial) == 0
            return same_call(call) if first else same_call(call, **{argument: without})

        return local

    return localize


def einsum_labels(equation: str, ndims: list[int]) -> Labels | None:
    """Labels of an einsum; None where an operand has a diagonal taken. An ellipsis is 0, 1, ... from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        return None
    named = [_term(term, ndim) for term, ndim in zip(terms, ndims, strict=True)]
    counts = Counter(name for names in named for name in names)
    hidden = tuple(sorted((name for name in counts if isinstance(name, int)), reverse=True))
    if any(len(set(names)) != len(names) for names in named):
        return None
    if arrow:
        head, _, tail = right.partition("...")
        out = (*head, *(hidden if "..." in right else ()), *tail)
    else:
        out = (*hidden, *sorted(name for name, count in counts.items() if count == 1 and isinstance(name, str)))
    return Labels(tuple(named), (out,))


def _term(term: str, ndim: int) -> Names:
    head, dots, tail = term.partition("...")
    hidden = ndim - len(head) - len(tail) if dots else 0
    return (*head, *reversed(range(hidden)), *tail)


def _einsum(call: OpCall) -> Labels | str:
    labels = einsum_labels(call.arguments["equation"], [len(spec.shape) for spec in call.specs])
    return labels or "einsum takes a diagonal"


def _scaled(call: OpCall) -> Labels:
    """A product of few bits: rows and columns are free, and their scales; kernels want columns in multiples of 16."""
    shapes = {name: spec.shape for name, spec in zip(call.slots, call.specs, strict=True)}
    columns = _in_multiples(call, 16)
    scales: dict[str, Names] = {"bias": (columns,)} if "bias" in shapes else {}
    if len(of_rows := shapes.get("scale_a", ())) == 2 and of_rows[0] == shapes["self"][0] > 1:
        scales["scale_a"] = (ROWS, None)
    if len(of_columns := shapes.get("scale_b", ())) == 2 and of_columns[1] == shapes["mat2"][1] > 1:
        scales["scale_b"] = (None, columns)
    return by_argument(call, (ROWS, columns), self=(ROWS, None), mat2=(None, columns), **scales)


def _of_integers(call: OpCall) -> Labels:
    """Rows and columns are free, of which kernels want multiples of 8."""
    columns = _in_multiples(call, 8)
    return by_argument(call, (ROWS, columns), self=(ROWS, None), mat2=(None, columns))


def _in_multiples(call: OpCall, count: int) -> str | None:
    """Columns, if they would be divided in multiples of this; else they stay whole."""
    return COLUMNS if _come_in(call, count, mat2=-1, scale_b=-1, bias=-1) else None


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`torch._int_mm`, of which CUDA wants more than 16 rows, of any number of rows."""
    rows = left.shape[0]
    if rows > _FEW_ROWS:
        return torch._int_mm(left, right)
    return torch._int_mm(torch.nn.functional.pad(left, (0, 0, 0, _FEW_ROWS + 1 - rows)), right)[:rows]


def _padded(call: OpCall, sharding: OpSharding) -> Localize | None:
    """A rank's few rows are filled up, where all together are enough."""
    parts = [as_layouts(sharding.outputs)[0].local_shape(call.out.shape, rank) for rank in range(call.mesh.world_size)]
    if call.out.shape[0] <= _FEW_ROWS or min(rows for rows, _ in parts) > _FEW_ROWS:
        return None
    given = call.arguments["self"], call.arguments["mat2"]
    return lambda rank: (integer_product, given, {})


def _grouped(call: OpCall) -> Labels:
    """Products of as many matrices: columns and what is summed up are free in parts that kernels take; where both
    operands have a dim of groups these are, and rows; of rows in groups by `offs` each rank has all."""
    given = dict(zip(call.slots, call.specs, strict=True))
    left, right = (len(given[name].shape) for name in ("self", "mat2"))
    if right != 3 or "bias" in given:
        return by_argument(call, (None,) * len(call.out.shape))
    count = max(16 // given["self"].dtype.itemsize, 1)
    inner = INNER if _come_in(call, count, self=left - 1, mat2=1) else None
    columns = COLUMNS if _come_in(call, count, mat2=2) else None
    outer: Names = ("group", ROWS) if left == 3 else (None,)
    return by_argument(call, (*outer, columns), self=(*outer, inner), mat2=(*outer[:1], inner, columns))


def _come_in(call: OpCall, count: int, **dims: int) -> bool:
    """Whether all parts of these operands' dims have sizes that are multiples of this."""
    places = zip(call.slots, call.layouts, strict=True)
    parts = (layout.dims[dims[name]] for name, layout in places if name in dims and layout.dims)
    return not any(size % count for part in parts if part is not None for size in part.sizes)


def _outer(call: OpCall) -> Labels:
    return Labels(((ROWS,), (COLUMNS,)), ((ROWS, COLUMNS),))


def _vecdot(call: OpCall) -> Labels:
    ndim = max(len(spec.shape) for spec in call.specs)
    names = [aligned(spec, ndim) for spec in call.specs]
    dim = call.arguments["dim"] % ndim
    return Labels(tuple(names), (tuple(name for name in range(ndim) if name != dim),))


def _inner(call: OpCall) -> Labels:
    sides = [tuple((side, d) for d in range(len(spec.shape) - 1)) for side, spec in enumerate(call.specs)]
    if not all(spec.shape for spec in call.specs):
        return Labels(tuple((None,) * len(spec.shape) for spec in call.specs), ((None,) * len(call.out.shape),))
    return Labels(((*sides[0], INNER), (*sides[1], INNER)), ((*sides[0], *sides[1]),))


def _cross(call: OpCall) -> Labels:
    """Three-vectors along `dim`, which must be whole."""
    ndim, dim = len(call.out.shape), call.arguments["dim"]
    if dim is None:
        return Labels(tuple((None,) * len(spec.shape) for spec in call.specs), ((None,) * ndim,))
    named = [tuple(None if d == dim % ndim else d for d in aligned(spec, ndim)) for spec in call.specs]
    return Labels(tuple(named), (tuple(None if d == dim % ndim else d for d in range(ndim)),))


def _distances(call: OpCall) -> Labels:
    """`cdist`: like a matrix product whose rows are all that matters."""
    batch = [tuple(range(-len(spec.shape), -2)) for spec in call.specs]
    out = max(batch, key=len)
    return Labels(((*batch[0], ROWS, None), (*batch[1], COLUMNS, None)), ((*out, ROWS, COLUMNS),))


def _matrices(call: OpCall) -> Labels:
    """Functions of square matrices, one by one."""
    names = plain(call.specs[0], [-2, -1])
    return Labels((names,), (names[: len(call.out.shape)],))


def _tensordot(call: OpCall) -> Labels:
    contracted = [call.arguments[name] for name in ("dims_self", "dims_other")]
    named = []
    for side, (spec, dims) in enumerate(zip(call.specs, contracted, strict=True)):
        places = [dim % len(spec.shape) for dim in dims]
        named.append(tuple(places.index(d) if d in places else (side, d) for d in range(len(spec.shape))))
    return Labels(tuple(named), (tuple(name for names in named for name in names if isinstance(name, tuple)),))


def _bilinear(call: OpCall) -> Labels:
    batch = tuple(range(len(call.out.shape) - 1))
    left, right = (name if _is_filled(call, **places) else None for name, places in _SIDES.items())
    weight = (COLUMNS, left, right)
    return by_argument(
        call, (*batch, COLUMNS), input1=(*batch, left), input2=(*batch, right), weight=weight, bias=(COLUMNS,)
    )


_SIDES = {"left": {"input1": -1, "weight": 1}, "right": {"input2": -1, "weight": 2}}


def _is_filled(call: OpCall, **dims: int) -> bool:
    """Whether every rank has some of these operands' dims, of which a kernel wants some."""
    places = zip(call.slots, call.layouts, strict=True)
    parts = (layout.dims[dims[name]] for name, layout in places if name in dims)
    return not any(0 in part.sizes for part in parts if part is not None)


NAMED: dict[Any, Callable[[OpCall], Labels | str]] = {aten.einsum: _einsum, aten.bilinear: _bilinear}
_MATRICES = (aten.matmul, aten.mm, aten.bmm)


def labels_of(node: fx.Node) -> Labels | None:
    """Which dims of operands and result of a product belong together, where any of them may be weights."""
    packet = getattr(node.target, "overloadpacket", None)
    describe = _matmul if packet in _MATRICES else NAMED.get(packet)
    whole = tuple(Layout.whole(len(operand.meta[SPEC].shape)) for operand in operands(node))
    labels = None if describe is None else describe(OpCall(node, Mesh.of(), whole))
    return labels if isinstance(labels, Labels) else None


def _contraction(describe: object, local: object = None) -> Rule:
    return labelled(describe, local, sums=True)  # type: ignore[arg-type]


RULES = {
    **rules_of(_contraction(_matmul), aten.matmul, aten.linalg_matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot),
    **rules_of(_contraction(_linear, _once("bias", None)), aten.linear),
    **rules_of(_contraction(_added, _once("beta", 0)), aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm),
    **rules_of(_contraction(_einsum), aten.einsum),
    **rules_of(verified(labelled(_scaled)), aten._scaled_mm),
    **rules_of(verified(labelled(_of_integers, _padded)), aten._int_mm),
    **rules_of(verified(_contraction(_grouped)), aten._grouped_mm),
    **rules_of(_contraction(_bilinear, _once("bias", None)), aten.bilinear),
    **rules_of(_contraction(_outer), aten.outer, aten.ger),
    **rules_of(_contraction(_vecdot), aten.linalg_vecdot),
    **rules_of(_contraction(_tensordot), aten.tensordot),
    **rules_of(_contraction(_inner), aten.inner),
    **rules_of(labelled(_cross), aten.cross, aten.linalg_cross),
    **rules_of(labelled(_distances), aten.cdist),
    **rules_of(labelled(_matrices), aten.linalg_inv, aten.inverse, aten.linalg_det, aten.det),
}

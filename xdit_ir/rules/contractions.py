"""Matrix products and einsum-like contractions: a divided contracted label leaves a partial sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xdit_ir.layout import Layout
from xdit_ir.partition import Partition
from xdit_ir.rules.base import Call, LocalCall, Rule, Ruling, by_size, choose, rules_of, same_call

aten = torch.ops.aten
Labels = tuple[tuple[int, ...], ...]


def _batched(call: Call) -> tuple[Labels, tuple[int, ...]]:
    """Labels of `matmul`-like operands and result; batch labels count from -3 downwards, so that they align."""
    left, right = (len(spec.shape) for spec in call.specs[:2])
    batch_left = tuple(range(-left, -2)) if left > 2 else ()
    batch_right = tuple(range(-right, -2)) if right > 2 else ()
    rows, inner, columns = 0, 1, 2
    a = (*batch_left, rows, inner) if left > 1 else (inner,)
    b = (*batch_right, inner, columns) if right > 1 else (inner,)
    batch = batch_left if left >= right else batch_right
    out = batch + ((rows,) if left > 1 else ()) + ((columns,) if right > 1 else ())
    return (a, b), out


def _linear_labels(call: Call) -> tuple[Labels, tuple[int, ...]]:
    ndim = len(call.specs[0].shape)
    batch = tuple(range(-ndim, -1))
    bias = ((2,),) if len(call.specs) > 2 else ()
    return ((*batch, 1), (2, 1), *bias), (*batch, 2)


def _added_labels(call: Call) -> tuple[Labels, tuple[int, ...]]:
    """`addmm` and `baddbmm`: an added operand, then a product."""
    batch = (-3,) if len(call.out.shape) == 3 else ()
    out = (*batch, 0, 2)
    added = out[len(out) - len(call.specs[0].shape) :]
    return (added, (*batch, 0, 1), (*batch, 1, 2)), out


def _contract(call: Call, labels: Labels, out: tuple[int, ...], added: int | None) -> Ruling:
    """Divide labels; where a contracted one is divided the result is partial, and one rank adds operand `added`."""
    sizes: dict[int, int] = {}
    for spec, names in zip(call.specs, labels, strict=True):
        for name, size in zip(names, spec.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 0))

    def candidates() -> Iterator[tuple[int, Partition]]:
        for place in by_size(call):
            for name, partition in zip(labels[place], call.layouts[place].dims, strict=True):
                if partition is not None and partition.size == sizes[name]:
                    yield name, partition

    chosen = choose(call.mesh, candidates())
    contracted = set(chosen) - set(out)
    if added is not None:
        for name in contracted:
            del chosen[name]
        contracted = set()
    partial = frozenset().union(*(call.varies(chosen[name]) for name in contracted))
    return Ruling(_inputs(call, labels, chosen), Layout(tuple(chosen.get(name) for name in out), partial))


def _inputs(call: Call, labels: Labels, chosen: dict[int, Partition]) -> tuple[Layout, ...]:
    inputs = []
    for spec, names in zip(call.specs, labels, strict=True):
        dims = (chosen.get(n) for n in names)
        fits = (p if p is None or p.size == size else None for p, size in zip(dims, spec.shape, strict=True))
        inputs.append(Layout(tuple(fits)))
    return tuple(inputs)


def _demand(call: Call, wanted: Layout, labels: Labels, out: tuple[int, ...]) -> tuple[Layout, ...]:
    chosen = {name: p for name, p in zip(out, wanted.dims, strict=True) if p is not None}
    return _inputs(call, labels, chosen)


def _matmul(call: Call) -> Ruling:
    return _contract(call, *_batched(call), added=None)


def _matmul_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return _demand(call, wanted, *_batched(call))


def _linear(call: Call) -> Ruling:
    """A divided input feature leaves a partial sum, to which the first rank of each group adds the bias."""
    labels, out = _linear_labels(call)
    ruling = _contract(call, labels, out, added=None)
    partial = ruling.outputs.partial if isinstance(ruling.outputs, Layout) else frozenset()
    if not partial or len(call.specs) < 3:
        return ruling

    def local(rank: int) -> LocalCall:
        first = call.mesh.index(rank, partial) == 0
        return same_call(call) if first else same_call(call, bias=None)

    return Ruling(ruling.inputs, ruling.outputs, local)


def _linear_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return None if wanted.dims[-1] is not None else _demand(call, wanted, *_linear_labels(call))


def _added(call: Call) -> Ruling:
    return _contract(call, *_added_labels(call), added=0)


def _added_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    return _demand(call, wanted, *_added_labels(call))


def einsum_labels(equation: str, ndims: list[int]) -> tuple[Labels, tuple[int, ...]] | None:
    """Labels of an explicit einsum without ellipsis or repeated labels in one operand; None otherwise."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(term)) != len(term) for term in terms):
        return None
    if [len(term) for term in terms] != ndims:
        return None
    return tuple(tuple(ord(c) for c in term) for term in terms), tuple(ord(c) for c in right)


def _einsum(call: Call) -> Ruling:
    parsed = einsum_labels(call.arguments["equation"], [len(s.shape) for s in call.specs])
    if parsed is None:
        whole = tuple(Layout.whole(len(s.shape)) for s in call.specs)
        return Ruling(whole, Layout.whole(len(call.out.shape)), fallback="einsum with ellipsis or diagonal")
    return _contract(call, *parsed, added=None)


def _einsum_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    parsed = einsum_labels(call.arguments["equation"], [len(s.shape) for s in call.specs])
    return None if parsed is None else _demand(call, wanted, *parsed)


RULES = {
    **rules_of(Rule(_matmul, _matmul_demand), aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot),
    **rules_of(Rule(_linear, _linear_demand), aten.linear),
    **rules_of(Rule(_added, _added_demand), aten.addmm, aten.baddbmm),
    **rules_of(Rule(_einsum, _einsum_demand), aten.einsum),
}

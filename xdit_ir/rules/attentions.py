"""Attention before lowering: the result follows the queries; what happens along the keys is decided later."""

from __future__ import annotations

from xdit_ir.layout import Layout
from xdit_ir.ops import attention, ring_attention
from xdit_ir.partition import Partition
from xdit_ir.rules.base import Call, Rule, Ruling, choose, rules_of


def _attention(call: Call) -> Ruling:
    """Batch and head dims agree; queries may be divided; keys and values agree in any division of their own."""
    q, k, v = call.layouts[:3]
    ndim = len(call.out.shape)
    grouped = call.specs[0].shape[-3] != call.specs[1].shape[-3] if ndim > 2 else False
    lead = choose(
        call.mesh,
        (
            (d - ndim, p)
            for layout in (q, k, v)
            for d, p in enumerate(layout.dims[:-2])
            if p is not None and p.size == call.out.shape[d] and not (grouped and d == ndim - 3)
        ),
    )
    taken = frozenset().union(*(call.varies(p) for p in lead.values()))
    queries = _free(call, q.dims[-2], taken)
    keys = _free(call, k.dims[-2], taken) or _free(call, v.dims[-2], taken)
    head = tuple(lead.get(d - ndim) for d in range(ndim - 2))
    k_head = _fit(call, 1, head)
    if grouped:
        head, k_head = (*head[:-1], q.dims[-3]), (*k_head[:-1], k.dims[-3])
    q_layout, k_layout = Layout((*head, queries, None)), Layout((*k_head, keys, None))
    masks = tuple(_mask_layout(call, i, q_layout) for i in range(3, len(call.specs)))
    return Ruling((q_layout, k_layout, k_layout, *masks), q_layout)


def _free(call: Call, partition: Partition | None, taken: frozenset[str]) -> Partition | None:
    return None if partition is None or call.varies(partition) & taken else partition


def _fit(call: Call, operand: int, head: tuple[Partition | None, ...]) -> tuple[Partition | None, ...]:
    shape = call.specs[operand].shape
    return tuple(p if p is None or p.size == shape[d] else None for d, p in enumerate(head))


def _mask_layout(call: Call, operand: int, q: Layout) -> Layout:
    """The mask is cut like the batch and heads; along queries and keys it is left as it comes."""
    shape, own = call.specs[operand].shape, call.layouts[operand].summed()
    offset = len(q.dims) - len(shape)
    dims = [q.dims[d + offset] if size == call.out.shape[d + offset] else None for d, size in enumerate(shape)]
    return Layout((*dims[:-2], *own.dims[-2:]))


def _attention_demand(call: Call, wanted: Layout) -> tuple[Layout, ...] | None:
    if wanted.dims[-1] is not None:
        return None
    head = wanted.dims[:-2]
    keys = Layout((*_fit(call, 1, head), None, None))
    masks = tuple(_mask_layout(call, i, wanted) for i in range(3, len(call.specs)))
    return (wanted, keys, keys, *masks)


RULES = rules_of(Rule(_attention, _attention_demand), attention, ring_attention)

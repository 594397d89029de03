"""Attention before lowering: the result follows the queries; what happens along the keys is decided later."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.ops import attention, attention_of_rows, ring_attention
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.base import Localize, OpCall, OpSharding, Rule, choose, rules_of, verified

Dims = tuple[Partition | None, ...]


def _grouped(call: OpCall) -> int:
    """How many heads of queries share one of keys and values."""
    q, k = (spec.shape for spec in call.specs[:2])
    return q[-3] // k[-3] if len(q) > 2 and len(k) > 2 and 1 < k[-3] < q[-3] else 1


def _attention(call: OpCall) -> OpSharding:
    """Batch and head dims agree; queries may be divided; keys and values agree in any division of their own."""
    head = batch_and_heads(call)
    taken = frozenset[str]().union(*(call.dividing_dims(partition) for partition in head))
    q, k, v = call.layouts[:3]
    queries = _free(call, q.dims[-2], taken)
    keys = _free(call, k.dims[-2], taken, exact=True) or _free(call, v.dims[-2], taken, exact=True)
    return _sharding(call, head, queries, keys)


def batch_and_heads(call: OpCall) -> Dims:
    """How the dims of the result before queries are divided: as operands have them."""
    chosen, ndim = choose(call.mesh, _candidates(call)), len(call.out.shape)
    return tuple(chosen.get(d - ndim) for d in range(ndim - 2))


def _candidates(call: OpCall) -> Iterator[tuple[int, Partition]]:
    """Partitions of the dims before queries and keys, by their place from the right."""
    group = _grouped(call)
    for layout in call.layouts[:3]:
        for d, partition in enumerate(layout.dims[:-2], start=-len(layout.dims)):
            if partition is None:
                continue
            if partition.size == call.out.shape[d]:
                whole_groups = group == 1 or d != -3 or shared_heads(partition, group) is not None
                if whole_groups:
                    yield d, partition
            elif group > 1 and d == -3:
                every = Indices.range(0, group)
                yield d, partition.map(call.out.shape[d], lambda part, e=every: part.outer(e, group))  # type: ignore[misc]


def shared_heads(heads: Partition, group: int) -> Partition | None:
    """The heads of keys for these heads of queries; None where a rank has unlike parts of several groups."""
    pairs = {part: part.factor(group) for part in set(heads.parts)}
    if any(pair is None for pair in pairs.values()):
        return None
    return Partition(heads.size // group, tuple(pair[0] for part in heads.parts if (pair := pairs[part])))


def parts_of_heads(mesh: Mesh, dims: Collection[str], queries: int, keys: int) -> tuple[Partition, Partition] | None:
    """So many heads of queries and of keys, divided over mesh dims; several ranks may need the same one of keys."""
    degree, group = mesh.size(dims), queries // keys
    if min(queries, keys) >= degree:
        k_heads, every = mesh.divide(keys, dims), Indices.range(0, group)
        return (k_heads.map(queries, lambda part: part.outer(every, group)) if group > 1 else k_heads), k_heads
    if queries < degree or keys == 1:
        return None
    q_heads = mesh.divide(queries, dims)
    shared = shared_heads(q_heads, group)
    return None if shared is None else (q_heads, shared)


def _free(call: OpCall, partition: Partition | None, taken: frozenset[str], *, exact: bool = False) -> Partition | None:
    """The partition where its mesh dims are not taken; `exact`: and where each index is held once.

    Causality needs the natural order on every rank that has everything.
    """
    if partition is None or call.dividing_dims(partition) & taken:
        return None
    if call.arguments["is_causal"] and not call.dividing_dims(partition):
        return None
    return None if exact and not call.mesh.tiles(partition) else partition


def _sharding(call: OpCall, head: Dims, queries: Partition | None, keys: Partition | None) -> OpSharding:
    q = Layout((*head_dims(call, 0, head), queries, None))
    k, v = (Layout((*head_dims(call, operand, head), keys, None)) for operand in (1, 2))
    output = Layout((*head, queries, None))
    masks = tuple(_mask_layout(call, operand, output, keys) for operand in range(3, len(call.specs)))
    return OpSharding((q, k, v, *masks), output, _rows(call, queries))


def _rows(call: OpCall, queries: Partition | None) -> Localize | None:
    """Causal attention of divided queries is told which they are."""
    given = call.arguments
    if queries is None or not given["is_causal"]:
        return None
    tensors = tuple(given[name] for name in ("q", "k", "v", "mask"))
    options = {name: given[name] for name in ("scale", "enable_gqa")}
    return lambda rank: (attention_of_rows, (*tensors, queries.parts[rank].runs), options)


def head_dims(call: OpCall, operand: int, head: Dims) -> Dims:
    """The dims before queries or keys of an operand that broadcasts, or has fewer heads; `head`: of the result."""
    shape, ndim = call.specs[operand].shape, len(call.out.shape)
    dims: list[Partition | None] = []
    for d in range(-len(shape), -2):
        partition = head[d + ndim]
        if partition is not None and partition.size != shape[d]:
            shared = d == -3 and operand > 0 and _grouped(call) > 1
            partition = shared_heads(partition, _grouped(call)) if shared else None
        dims.append(partition)
    return tuple(dims)


def _mask_layout(call: OpCall, operand: int, output: Layout, keys: Partition | None) -> Layout:
    """The mask is cut like batch and heads. Along queries and keys it has their order where these are whole, and is
    left as it comes where these are divided, if it can be."""
    shape, own = call.specs[operand].shape, call.layouts[operand]
    full = (*output.dims[:-1], keys)
    sizes = (*call.out.shape[:-1], call.specs[1].shape[-2])
    dims: list[Partition | None] = []
    used: frozenset[str] = frozenset()
    for d in range(-len(shape), 0):
        partition = full[d] if shape[d] == sizes[d] else None
        if d >= -2 and shape[d] == sizes[d] and call.dividing_dims(full[d]):
            partition = None if call.dividing_dims(own.dims[d]) & used else own.dims[d]
        used |= call.dividing_dims(partition)
        dims.append(partition)
    return Layout(tuple(dims))


def _attention_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    """Queries that are cut take the rows of the mask with them; keys of divided features stay as they are."""
    queries = wanted.dims[-2]
    if wanted.dims[-1] is not None:
        return None
    features = any(call.dividing_dims(dim) & {*FEATURES} for dim in wanted.dims[:-2])
    keys = call.layouts[1].dims[-2] if features else None
    inputs = _sharding(call, wanted.dims[:-2], queries, keys).inputs
    masks = []
    for spec, layout in zip(call.specs[3:], inputs[3:], strict=True):
        rows = len(spec.shape) > 1 and spec.shape[-2] == call.out.shape[-2]
        masks.append(layout.with_dims({-2: queries}) if rows else layout)
    return (*inputs[:3], *masks)


RULES = rules_of(verified(Rule(_attention, _attention_demand)), attention, ring_attention)

"""Attention over parts of the keys, of which a rank has one: its results are rows of that part. Their merge is local
where a rank has the rows of all parts for its queries."""

from __future__ import annotations

from collections.abc import Sequence

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partial_attention import merge_partials, partial_attention
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.rules.attentions import batch_and_heads, head_dims
from xdit_ir.rules.base import LocalCall, Localize, OpCall, OpSharding, Rule, rules_of

Places = tuple[Indices, ...]


def _partial(call: OpCall) -> OpSharding:
    """Batch and heads as in any attention; queries may be divided, and keys into the parts that are asked for."""
    head = batch_and_heads(call)
    taken = frozenset[str]().union(*(call.dividing_dims(partition) for partition in head))
    queries, keys = (
        None if partition is None or call.dividing_dims(partition) & taken else partition
        for partition in (call.layouts[0].dims[-2], call.layouts[1].dims[-2])
    )
    parts = _parts(call)
    places = None if keys is None else _places(keys, parts)
    rows = None if places is None else _rows(call, queries, len(parts), places)
    if rows is None or not call.mesh.covers(rows):
        keys, rows = None, _rows(call, queries, len(parts), (Indices.range(0, len(parts)),) * call.mesh.world_size)
    q = Layout((*head_dims(call, 0, head), queries, None))
    k, v = (Layout((*head_dims(call, operand, head), keys, None)) for operand in (1, 2))
    masks = (_mask(call, operand, (*head, queries, None)) for operand in range(3, len(call.specs)))
    return OpSharding((q, k, v, *masks), Layout((*head, rows, None)), None if keys is None else _own(call, keys))


def _parts(call: OpCall) -> Places:
    given = call.arguments["parts"]
    return (Indices.range(0, call.specs[1].shape[-2]),) if given is None else tuple(map(Indices.of_runs, given))


def _places(keys: Partition, parts: Sequence[Indices]) -> Places | None:
    """Which of the parts every rank has; None where some rank has none of them, or not as it stands there."""
    if any(part not in parts for part in keys.parts):
        return None
    return tuple(Indices.range(at, at + 1) for at in (parts.index(part) for part in keys.parts))


def _rows(call: OpCall, queries: Partition | None, count: int, places: Places) -> Partition:
    """The results that every rank has: those of its queries, of its parts."""
    size = call.specs[0].shape[-2]
    every = Indices.range(0, size)
    held = (every,) * len(places) if queries is None else queries.parts
    return Partition(count * size, tuple(own.outer(part, size) for own, part in zip(places, held, strict=True)))


def _mask(call: OpCall, operand: int, full: tuple[Partition | None, ...]) -> Layout:
    """The mask is cut like batch, heads and queries; its columns are all keys."""
    shape = call.specs[operand].shape
    sizes = (*call.out.shape[:-2], call.specs[0].shape[-2], call.specs[1].shape[-2])
    offset = len(sizes) - len(shape)
    return Layout(tuple(full[d + offset] if size == sizes[d + offset] else None for d, size in enumerate(shape)))


def _own(call: OpCall, keys: Partition) -> Localize:
    """A rank's keys are one part, and it is told which."""
    given = call.arguments
    tensors = tuple(given[name] for name in ("q", "k", "v", "mask"))
    options = {name: given[name] for name in ("scale", "enable_gqa")}
    masked = len(call.specs) > 3 and call.specs[3].shape[-1] == keys.size

    def local(rank: int) -> LocalCall:
        return partial_attention, tensors, {**options, **({"columns": keys.parts[rank].runs} if masked else {})}

    return local


def _merged(call: OpCall) -> OpSharding:
    layout, parts = call.layouts[0].summed().with_dims({-1: None}), call.arguments["parts"]
    partition = layout.dims[-2]
    queries = None if partition is None else _of_all_parts(partition, parts)
    wanted = layout if queries is not None else layout.with_dims({-2: None})
    return OpSharding((wanted,), wanted.with_dims({-2: queries}))


def _of_all_parts(rows: Partition, parts: int) -> Partition | None:
    """The queries of which every rank has the rows of all parts, in their order; None where that is not so."""
    size = rows.size // parts
    found = {part: part.factor(size) if part.size else None for part in set(rows.parts)}
    if any(part.size and (pair is None or not pair[0].is_whole(parts)) for part, pair in found.items()):
        return None
    return Partition(size, tuple(pair[1] if (pair := found[part]) else Indices(()) for part in rows.parts))


RULES = {
    **rules_of(Rule(_partial), partial_attention),
    **rules_of(Rule(_merged), merge_partials),
}

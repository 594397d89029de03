"""Where the rows of a value come from: through selections, joins, pads and writes at places that are known."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import bound_arguments, operands
from xdit_ir.ir.program import SPEC
from xdit_ir.passes.find_tokens import JOINS, PADS, joined_dim

aten = torch.ops.aten
FILLED = (aten.zeros.default, aten.new_zeros.default, aten.full.default, aten.new_full.default, aten.ones.default)


@dataclass(frozen=True)
class RowRun:
    """`length` rows from `start` on of a value, of one `sample` of it where it has several; without one: padding."""

    source: fx.Node | None
    start: int
    length: int
    sample: int | None = None
    fill: float = 0.0


Rows = tuple[RowRun, ...]


def samples_of(node: fx.Node) -> list[fx.Node] | None:
    """The samples that a value is put together from along its first dim; one that is filled with a number is the whole
    that was filled so. None where it is not put together from samples."""
    if node.target is aten.stack.default and (len(node.args) < 2 or node.args[1] == 0):
        return list(operands(node))
    if _filled_with(node) is not None:
        return [node] * node.meta[SPEC].shape[0] if node.meta[SPEC].shape else None
    if node.target is aten.select_scatter.default and node.args[2] == 0:
        base, source, _, place = node.args
        assert isinstance(base, fx.Node) and isinstance(source, fx.Node) and isinstance(place, int)
        known = samples_of(base)
        return known if known is None else [source if i == place else one for i, one in enumerate(known)]
    return None


def rows_of(node: fx.Node, dim: int, size: int) -> Rows:
    """Where the `size` rows of a value, or of a sample of it, along a dim come from."""
    if (fill := _filled_with(node)) is not None:
        return (RowRun(None, 0, size, fill=fill),)
    found = _followed(node, dim)
    return (RowRun(node, 0, size),) if found is None else tuple(run for run in found if run.length)


def rows_at(rows: Rows, places: Iterable[tuple[int, int]]) -> Iterator[RowRun]:
    """The rows at these places, in runs."""
    for start, length in places:
        place = 0
        for run in rows:
            first, last = max(start, place), min(start + length, place + run.length)
            if first < last:
                yield replace(run, start=run.start + first - place, length=last - first)
            place += run.length


def _filled_with(node: fx.Node) -> float | None:
    """The number that a value is full of, if it is."""
    if node.target not in FILLED:
        return None
    number = bound_arguments(node).get("fill_value", float(node.target is aten.ones.default))
    return float(number) if isinstance(number, (bool, int, float)) else None


def _followed(node: fx.Node, dim: int) -> Iterable[RowRun] | None:
    taken = sample_taken(node)
    if taken is not None:
        source, along, place = taken
        return None if along else _sample(source, place, dim, node.meta[SPEC].shape[dim])
    if node.target is operator.getitem:
        return _part(node, dim)
    if node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", None)
    ndim = len(node.meta[SPEC].shape) if packet in JOINS else 0
    if ndim and not node.kwargs and joined_dim(node) % ndim == dim:
        if any(len(part.meta[SPEC].shape) != ndim for part in operands(node)):
            return None
        return itertools.chain.from_iterable(_all(part, dim) for part in operands(node))
    if node.target is aten.slice.Tensor or node.target is aten.slice_scatter.default:
        return _slice(node, dim)
    if node.target in PADS:
        return _pad(node, dim)
    args: Any = node.args
    if node.target is ops.take and args[1] == dim:
        return rows_at(_all(args[0], dim), args[2])
    if node.target is ops.put and args[2] == dim:
        return _written(_all(args[0], dim), _all(args[1], dim), args[3])
    return None


def _all(node: Any, dim: int) -> Rows:
    return rows_of(node, dim, node.meta[SPEC].shape[dim])


def _written(base: Rows, source: Rows, runs: Sequence[tuple[int, int]]) -> Iterator[RowRun]:
    """The rows of a base of which those at these places are replaced."""
    starts = itertools.accumulate((length for _, length in runs), initial=0)
    free = 0
    for (start, length), taken in sorted(zip(runs, starts, strict=False)):
        yield from rows_at(base, [(free, start - free)])
        yield from rows_at(source, [(taken, length)])
        free = start + length
    yield from rows_at(base, [(free, sum(run.length for run in base) - free)])


def _slice(node: fx.Node, dim: int) -> Iterable[RowRun] | None:
    given = bound_arguments(node)
    base: Any = given.get("input", given.get("self"))
    rank = len(base.meta[SPEC].shape)
    if given["dim"] % rank != dim or given["step"] != 1:
        return None
    size = base.meta[SPEC].shape[dim]
    start, end, _ = slice(given["start"], given["end"]).indices(size)
    if node.target is aten.slice.Tensor:
        return rows_at(_all(base, dim), [(start, end - start)])
    return _written(_all(base, dim), _all(given["src"], dim), [(start, end - start)])


def _pad(node: fx.Node, dim: int) -> Iterable[RowRun] | None:
    [source], given = operands(node), bound_arguments(node)
    widths: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    at = 2 * (len(node.meta[SPEC].shape) - 1 - dim)
    if (
        given.get("mode", "constant") != "constant"
        or at >= len(widths)
        or min(widths) < 0
        or any(w for i, w in enumerate(widths) if i not in (at, at + 1))
    ):
        return None
    fill = float(given.get("value") or 0)
    around = [RowRun(None, 0, width, fill=fill) for width in widths[at : at + 2]]
    return (*around[:1], *_all(source, dim), *around[1:])


def _part(node: fx.Node, dim: int) -> Iterable[RowRun] | None:
    """A part of a split."""
    [split], place = operands(node), node.args[1]
    packet = getattr(split.target, "overloadpacket", None)
    if packet not in (aten.split, aten.split_with_sizes) or not isinstance(place, int):
        return None
    along = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if not isinstance(along, int) or along % len(node.meta[SPEC].shape) != dim:
        return None
    sizes = [spec.shape[dim] for spec in split.meta[SPEC]]
    return rows_at(_all(operands(split)[0], dim), [(sum(sizes[:place]), sizes[place])])


def sample_taken(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The value of which a node is one sample, along which dim, and which."""
    args: Any = node.args
    if node.target is aten.select.int:
        return args[0], args[1] % len(args[0].meta[SPEC].shape), args[2] % args[0].meta[SPEC].shape[args[1]]
    if node.target is operator.getitem and args[0].target is aten.unbind.int:
        source, dim = operands(args[0])[0], bound_arguments(args[0])["dim"]
        return source, dim % len(source.meta[SPEC].shape), args[1]
    return None


def _sample(source: fx.Node, place: int, dim: int, size: int) -> Iterable[RowRun]:
    known = samples_of(source)
    return [RowRun(source, 0, size, place)] if known is None else rows_of(known[place], dim, size)

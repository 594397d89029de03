"""How the pieces of several values that go to one member travel as one message.

Both ends lay it out by what both know: the shape of each piece, and where it lands. Where the pieces of all values are
rows (of one length or of several, as many rows of each), as queries, keys and values of the same tokens are, the first
rows of all come first, then the second ones. Then messages from all members, one behind the other, are tables whose
columns are the results, and need not be put together. Otherwise the pieces lie one behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xdit_ir.ir.collective_ops import Assembly, PlainAssembly, Takes, cut, join, takes_of
from xdit_ir.ir.partition import Runs
from xdit_ir.ir.relayout import RankExchange

PACKED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8)
"""Types that both NCCL and gloo move as they are."""
Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Rows = tuple[int, ...]
"""For each value of a message the dimension that counts its rows, in front of which are ones only; none: no table."""


@dataclass(frozen=True)
class Packing:
    """A rank's part in an exchange of several values, as numbers.

    `takes`, `shapes` and `assemblies` are per value, see `RankExchange`; `shapes[value][member]` of what comes.
    `leaving` and `coming` say how messages to and from each member are laid out. `chunked`: each member gets an equal
    part of the columns of all tables. `direct`: what comes is the results; otherwise the pieces that stay here do not
    travel.
    """

    at: int
    takes: tuple[Takes, ...]
    shapes: tuple[Shapes, ...]
    assemblies: tuple[PlainAssembly, ...]
    leaving: tuple[Rows, ...]
    coming: tuple[Rows, ...]
    chunked: bool
    direct: bool

    @staticmethod
    def of(exchanges: Sequence[RankExchange], at: int) -> Packing:
        """That of member `at` of the group."""
        members, assemblies = range(len(exchanges[0].group)), [Assembly.of(one) for one in exchanges]
        coming = tuple(
            _rows([(one.shapes[member], one.places[member], one.shape) for one in exchanges]) for member in members
        )
        leaving = tuple(
            _rows(
                [
                    (one.sends[member].shape, one.landings[member].places, one.landings[member].shape)
                    for one in exchanges
                ]
            )
            for member in members
        )
        tables = all(rows for member, rows in enumerate(coming) if any(math.prod(x.shapes[member]) for x in exchanges))
        joined = len(exchanges) == 1 or (tables and any(coming))
        direct = joined and all(one.is_contiguous for one in assemblies)
        travels = [i for i in members if i != at or direct]
        shapes = tuple(tuple(s if i in travels else (0,) for i, s in enumerate(one.shapes)) for one in exchanges)
        takes = tuple(map(takes_of, exchanges))
        alike = direct and leaving[0] and len(set(leaving)) == 1
        chunked = alike and all(_is_chunked(one, row) for one, row in zip(exchanges, leaving[0], strict=True))
        return Packing(
            at,
            takes,
            shapes,
            tuple(one.plain for one in assemblies),
            leaving,
            coming,
            bool(chunked),
            direct,
        )


def _rows(pieces: Sequence[tuple[Shape, tuple[Runs | None, ...], Shape]]) -> Rows:
    """How one message of pieces (their shapes, places in results, shapes of these) is laid out."""
    dims = []
    for shape, places, whole in pieces:
        partly = [d for d, runs in enumerate(places) if runs is not None and runs != ((0, whole[d]),)]
        if len(partly) != 1 or math.prod(shape[: partly[0]]) != 1:
            return ()
        dims += partly
    return tuple(dims) if len({shape[dim] for (shape, _, _), dim in zip(pieces, dims, strict=True)}) == 1 else ()


def _is_chunked(exchange: RankExchange, row: int) -> bool:
    """Whether each member is sent an equal part, in order, of the dimension behind that which counts rows."""
    dims = {d for piece in exchange.sends for d, runs in enumerate(piece.take) if runs is not None}
    if dims != {row + 1}:
        return False
    size, rest = divmod(exchange.held[row + 1], len(exchange.sends))
    return not rest and all(piece.take[row + 1] == ((i * size, size),) for i, piece in enumerate(exchange.sends))


def message_of(
    xs: Sequence[torch.Tensor], takes: Sequence[Takes], leaving: Sequence[Rows], at: int, direct: bool
) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """Messages to all members, one behind the other; their sizes; and the pieces that do not travel."""
    pieces = [cut(x, each) for x, each in zip(xs, takes, strict=True)]
    travel = [[own[member] for own in pieces] if member != at or direct else [] for member, _ in enumerate(leaving)]
    sizes = [sum(piece.numel() for piece in each) for each in travel]
    parts = [part for each, rows in zip(travel, leaving, strict=True) for part in _message(each, rows)]
    full = [part for part in parts if part.numel()]
    flat = torch.cat(full) if len(full) > 1 else full[0].contiguous() if full else xs[0].new_empty(0)
    return flat, sizes, [] if direct else [each[at] for each in pieces]


def tables_of(xs: Sequence[torch.Tensor], rows: Rows) -> list[torch.Tensor]:
    """Values as tables `[rows, columns]`."""
    return [x.reshape(x.shape[row], math.prod(x.shape[row + 1 :])) for x, row in zip(xs, rows, strict=True)]


def chunk_messages(xs: Sequence[torch.Tensor], rows: Rows, members: int) -> torch.Tensor:
    """Values as one table for each member, `[members, rows, columns]` in one copy, where each gets an equal part of the
    columns of all."""
    parts = [_chunks(x, row, members) for x, row in zip(xs, rows, strict=True)]
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0].contiguous()


def _chunks(x: torch.Tensor, row: int, members: int) -> torch.Tensor:
    """A value's part of these tables."""
    count, width = x.shape[row], math.prod(x.shape[row + 1 :])
    columns = width // members
    if x.is_contiguous() and not torch.compiler.is_compiling():  # one view in the place of three
        return x.as_strided((members, count, columns), (columns, width, 1))
    return x.reshape(count, members, columns).transpose(0, 1)


def _message(pieces: Sequence[torch.Tensor], rows: Rows) -> list[torch.Tensor]:
    if rows and len(pieces) > 1:
        return [torch.cat(tables_of(pieces, rows), 1).reshape(-1)]
    return [piece.reshape(-1) for piece in pieces]


def coming_sizes(shapes: Sequence[Shapes]) -> list[int]:
    """Elements that come from each member."""
    return [sum(map(math.prod, each)) for each in zip(*shapes, strict=True)]


def results_of_messages(
    flat: torch.Tensor,
    own: Sequence[torch.Tensor],
    shapes: Sequence[Shapes],
    assemblies: Sequence[PlainAssembly],
    coming: Sequence[Rows],
    at: int,
    direct: bool,
) -> list[torch.Tensor]:
    """What comes from all members, and the pieces that stayed here, as results."""
    if direct and len(assemblies) == 1:
        return [flat.view(assemblies[0][0])]
    if direct:
        dims = next(rows for rows in coming if rows)
        widths = [math.prod(result[0][dim + 1 :]) for result, dim in zip(assemblies, dims, strict=True)]
        columns = torch.split_with_sizes(flat.view(-1, sum(widths)), widths, 1)
        return [column.view(result[0]) for column, result in zip(columns, assemblies, strict=True)]
    pieces: list[list[torch.Tensor]] = [[] for _ in shapes]
    for member, message in enumerate(torch.split_with_sizes(flat, coming_sizes(shapes))):
        given = own if member == at else _pieces(message, [each[member] for each in shapes], coming[member])
        for found, piece in zip(pieces, given, strict=True):
            found.append(piece)
    return [join(each, *assembly) for each, assembly in zip(pieces, assemblies, strict=True)]


def _pieces(message: torch.Tensor, shapes: Shapes | list[Shape], rows: Rows) -> list[torch.Tensor]:
    """The pieces of one message."""
    if not rows or len(shapes) == 1:
        parts = torch.split_with_sizes(message, [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    widths = [math.prod(shape[dim + 1 :]) for shape, dim in zip(shapes, rows, strict=True)]
    columns = torch.split_with_sizes(message.view(shapes[0][rows[0]], sum(widths)), widths, 1)
    return [column.view(shape) for column, shape in zip(columns, shapes, strict=True)]

"""Tensors on the wire: as flat elements of a type that every backend moves, started, waited for, and typed again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xdit_ir.transport.packing import PACKED, chunk_messages


def start(
    pieces: Sequence[torch.Tensor],
    shapes: Sequence[tuple[int, ...]],
    group: str,
    after: Sequence[torch.Tensor] = (),
    *,
    at_once: bool = False,
) -> torch.Tensor:
    """Start an all-to-all: `pieces[i]` goes to member `i`, a tensor of `shapes[i]` comes from it; see `finish`. No
    compiler starts it before what gave `after`; if it is done `at_once`, nothing waits for it.

    All members of the group must call it; any piece may be empty.
    """
    width = _width(pieces[0].dtype)
    full = [on_wire(piece) for piece in pieces if piece.numel()]
    flat = torch.cat(full) if len(full) > 1 else full[0].contiguous() if full else on_wire(pieces[0])
    arriving = [math.prod(shape) * width for shape in shapes]
    leaving = [piece.numel() * width for piece in pieces]
    return begin(flat, arriving, leaving, group, after, at_once=at_once)


def begin(
    flat: torch.Tensor,
    coming: list[int],
    leaving: list[int],
    group: str,
    after: Sequence[torch.Tensor],
    *,
    at_once: bool,
) -> torch.Tensor:
    """Start an all-to-all of elements, of which `leaving` go to each member; the rest as for `start`."""
    ops: Any = torch.ops
    if at_once:
        done: torch.Tensor = ops.xdit_ir.exchange(flat, list(after), coming, leaving, group)
        return done
    if after:
        begun: torch.Tensor = ops.xdit_ir.begin(flat, list(after), coming, leaving, group)
        return begun
    pending: torch.Tensor = ops._c10d_functional.all_to_all_single(flat, coming, leaving, group)
    return pending


def begin_tables(
    tables: Sequence[torch.Tensor], coming: list[int], group: str, after: Sequence[torch.Tensor], *, at_once: bool
) -> torch.Tensor:
    """The same for tables `[rows, columns]`, of whose columns each member gets an equal part."""
    if at_once:
        done: torch.Tensor = torch.ops.xdit_ir.exchange_tables(list(tables), list(after), coming, group)
        return done
    messages = chunk_messages(tables, (0,) * len(tables), len(coming))
    sizes = [messages.shape[1] * messages.shape[2]] * len(coming)
    return begin(messages.view(-1), coming, sizes, group, after, at_once=False)


def begin_gather(flat: torch.Tensor, count: int, group: str, after: Sequence[torch.Tensor]) -> torch.Tensor:
    """Start to gather as many elements from each of `count` members; `after` as for `start`."""
    ops: Any = torch.ops
    pending: torch.Tensor = (
        ops.xdit_ir.begin_gather(flat, list(after), count, group)
        if after
        else ops._c10d_functional.all_gather_into_tensor(flat, count, group)
    )
    return pending


def begin_sum(x: torch.Tensor, group: str, after: Sequence[torch.Tensor]) -> torch.Tensor:
    """Start to add up what all members have; `after` as for `start`."""
    ops: Any = torch.ops
    pending: torch.Tensor = (
        ops.xdit_ir.begin_sum(x, list(after), group) if after else ops._c10d_functional.all_reduce(x, "sum", group)
    )
    return pending


def finish(pending: torch.Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """The pieces that `start` fetches, once they are there."""
    return apart(wait(pending), shapes, dtype)


def apart(there: torch.Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """The pieces that have come, one behind the other."""
    width = _width(dtype)
    parts = torch.split_with_sizes(there, [math.prod(shape) * width for shape in shapes])
    return [typed(part, shape, dtype) for part, shape in zip(parts, shapes, strict=True)]


def typed(flat: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Flat elements as they travelled, as a tensor."""
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(*shape, 2))
    return flat.view(dtype).view(shape)


def on_wire(x: torch.Tensor) -> torch.Tensor:
    """The elements as a flat tensor of a type that every backend can move."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj()).reshape(-1)
    flat = x.reshape(-1)
    return flat if x.dtype in PACKED else flat.contiguous().view(torch.uint8)


def _width(dtype: torch.dtype) -> int:
    """Elements on the wire per element."""
    if dtype.is_complex:
        return 2
    return 1 if dtype in PACKED else dtype.itemsize


def wait(pending: torch.Tensor) -> torch.Tensor:
    """What was started, once it is there."""
    arrived: torch.Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return arrived

"""Exchanges of eager code: the process group is called as it is, with all prepared that can be.

On a GPU the collective runs on the stream that computes, so that nothing waits for another stream: beside the kernels
of other work it would hardly run anyway. The backend of CPUs goes on by itself until the result is needed. Compiled
code and CUDA graphs take the functional collectives of `collectives` instead, which can be traced; so do these modules
where somebody compiles them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllToAllOptions

from xdit_ir.ir.collective_ops import PlainAssembly, join
from xdit_ir.ir.program import dense_strides
from xdit_ir.ir.relayout import RankExchange
from xdit_ir.transport.collectives import Exchange
from xdit_ir.transport.packing import Packing, Rows, Shape, chunk_messages, coming_sizes, message_of

Sent = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Any]
"""Room for what comes; what leaves, which must stay until then; the pieces that stay here; what is to be waited for."""
View = tuple[Shape, Shape, int]
"""Shape, strides and offset of what lies in that room."""


class DirectSend(Exchange):
    """The first half of one or several changes of layout at once."""

    def __init__(self, packing: Packing, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._packing, self._group, self._name = packing, group, group.group_name
        self._coming = coming_sizes(packing.shapes)
        self._total = sum(self._coming)
        self._options = AllToAllOptions()
        self._options.asyncOp = False

    def forward(self, *xs: torch.Tensor) -> Sent:
        """`xs`, this rank's parts in the old layouts -> what `DirectReceive` takes."""
        packing, members = self._packing, len(self._coming)
        own: list[torch.Tensor] = []
        if packing.chunked:
            flat = chunk_messages(xs, packing.leaving[0], members).view(-1)
            sizes = [flat.numel() // members] * members
        else:
            flat, sizes, own = message_of(xs, packing.takes, packing.leaving, packing.at, packing.direct)
        if torch.compiler.is_compiling():
            return torch.ops._c10d_functional.all_to_all_single(flat, self._coming, sizes, self._name), flat, own, None
        room = flat.new_empty(self._total)
        work = self._group.alltoall_base(room, flat, self._coming, sizes, self._options)
        return room, flat, own, work


class DirectReceive(Exchange):
    """The second half: `one` result of one change of layout, or a tuple of those of several."""

    handed = None

    def __init__(self, packing: Packing, *, one: bool) -> None:
        super().__init__()
        self._one, self._at, self._joins = one, packing.at, [_Join(each) for each in packing.assemblies]
        messages = _messages(packing)
        self._pieces = [[each[place] for each in messages] for place in range(len(packing.assemblies))]
        self._results = _columns(packing, messages) if packing.direct else []

    def forward(self, sent: Sent) -> Any:
        """What `DirectSend` gave -> this rank's parts in the new layouts."""
        room, _, own, work = sent
        if work is not None:
            work.wait()
        elif torch.compiler.is_compiling():
            room = torch.ops._c10d_functional.wait_tensor(room)
        if self._results:
            found = [room.as_strided(*view) for view in self._results]
        else:
            found = [
                joined([kept if member == self._at else room.as_strided(*view) for member, view in enumerate(views)])
                for kept, views, joined in zip(own, self._pieces, self._joins, strict=True)
            ]
        return found[0] if self._one else found


class _Join:
    """How pieces become a result: in the order in which whole ones follow each other along a dimension, or as `join`
    does it."""

    def __init__(self, assembly: PlainAssembly) -> None:
        self._assembly = assembly
        _, self._dim, sections, _ = assembly
        members = [member for member, _, _ in sections]
        self._order = members if self._dim is not None and len(set(members)) == len(members) else []

    def __call__(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._order:
            return torch.cat([pieces[member] for member in self._order], self._dim or 0)
        return join(pieces, *self._assembly)


def direct_halves(
    exchanges: Sequence[RankExchange], at: int, group: dist.ProcessGroup, *, one: bool
) -> tuple[DirectSend, DirectReceive]:
    """Both halves for member `at` of a group."""
    packing = Packing.of(exchanges, at)
    return DirectSend(packing, group), DirectReceive(packing, one=one)


def _messages(packing: Packing) -> list[list[View]]:
    """For each member where the pieces that come from it lie."""
    starts = itertools.accumulate(coming_sizes(packing.shapes), initial=0)
    return [
        _pieces([each[member] for each in packing.shapes], rows, start)
        for member, (rows, start) in enumerate(zip(packing.coming, starts, strict=False))
    ]


def _pieces(shapes: Sequence[Shape], rows: Rows, start: int) -> list[View]:
    """As `packing` lays out one message."""
    sizes = [math.prod(shape) for shape in shapes]
    if not rows or len(shapes) == 1:
        starts = itertools.accumulate(sizes, initial=start)
        return [(shape, dense_strides(shape), first) for shape, first in zip(shapes, starts, strict=False)]
    widths = [math.prod(shape[row + 1 :]) if len(shape) > row else 0 for shape, row in zip(shapes, rows, strict=True)]
    places = itertools.accumulate(widths, initial=start)
    return [
        (shape, (*dense_strides(shape)[:row], sum(widths), *dense_strides(shape)[row + 1 :]), first)
        for shape, row, first in zip(shapes, rows, places, strict=False)
    ]


def _columns(packing: Packing, messages: Sequence[Sequence[View]]) -> list[View]:
    """Where the results lie, if messages one behind the other are these."""
    first = next((each for each, rows in zip(messages, packing.coming, strict=True) if rows), messages[0])
    if len(packing.assemblies) == 1:
        return [(packing.assemblies[0][0], dense_strides(packing.assemblies[0][0]), 0)]
    base = first[0][2]
    return [(result[0], strides, at - base) for result, (_, strides, at) in zip(packing.assemblies, first, strict=True)]

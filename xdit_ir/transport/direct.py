"""Exchanges of eager code: the process group is called as it is, with all prepared that can be.

On a GPU a collective is begun by the host on the stream that computes, so that nothing has to wait for another stream:
beside the kernels of other work it would hardly run anyway. The backend of CPUs goes on by itself until the result is
needed. Compiled code and CUDA graphs take the functional collectives of `collectives` instead, which can be traced; so
do these modules where somebody compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllToAllOptions

from xdit_ir.ir.layout import RankExchange
from xdit_ir.transport.collectives import Exchange
from xdit_ir.transport.packing import Packing, chunk_messages, coming_sizes, message_of, results_of_messages

Sent = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Any]
"""Room for what comes; what leaves, which must stay until then; the pieces that stay here; what is to be waited for."""


class DirectSend(Exchange):
    """The first half of one or several changes of layout at once."""

    def __init__(self, packing: Packing, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._packing, self._group = packing, group
        self._coming = coming_sizes(packing.shapes)
        self._total = sum(self._coming)
        self._name = group.group_name
        self._options = AllToAllOptions()
        self._options.asyncOp = False

    def forward(self, *xs: torch.Tensor) -> Sent:
        """`xs`, this rank's parts in the old layouts -> what `DirectReceive` takes."""
        packing = self._packing
        own: list[torch.Tensor] = []
        if packing.chunks:
            flat = chunk_messages(xs, packing.chunks, packing.leaving[0], len(self._coming)).view(-1)
            sizes = [flat.numel() // len(self._coming)] * len(self._coming)
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
        self._one = one
        self._given = packing.shapes, packing.assemblies, packing.coming, packing.at, packing.direct

    def forward(self, sent: Sent) -> Any:
        """What `DirectSend` gave -> this rank's parts in the new layouts."""
        room, _, own, work = sent
        if work is not None:
            work.wait()
        elif torch.compiler.is_compiling():
            room = torch.ops._c10d_functional.wait_tensor(room)
        found = results_of_messages(room, own, *self._given)
        return found[0] if self._one else found


def direct_halves(
    exchanges: Sequence[RankExchange], at: int, group: dist.ProcessGroup, *, one: bool
) -> tuple[DirectSend, DirectReceive]:
    """Both halves for member `at` of a group."""
    packing = Packing.of(exchanges, at)
    return DirectSend(packing, group), DirectReceive(packing, one=one)

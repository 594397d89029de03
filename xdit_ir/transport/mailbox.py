"""Exchanges inside blocks over symmetric memory: who writes where, and why nothing is overwritten too early.

Every exchange of a block has slots in every member's workspace. A sender copies into the receiver's slot without
asking, and raises a flag there. That is safe because successive calls of a block take different slots: when a rank
writes to a slot for the second time it has waited, in the call between, for something that the receiver sent after
it had read that slot for the first time. It needs three things, which `Mailbox` sees to: slots alternate over the
calls of a block and from the last call of a forward to the first of the next; every exchange is awaited inside the
call that started it; and its result is not returned from the block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import Reshuffle
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.transport.copies import Copy, copies
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.workspace import HEADER, SIGNALS, SLOTS

ALIGNMENT = 512
MOST_COPIES = 16  # per peer; an exchange in smaller pieces is left to a collective


def slot_sequence(calls: int) -> list[int]:
    """The slot of each call of a block in one forward; neighbours differ, the last and the first too."""
    sequence = [call % 2 for call in range(calls)]
    if calls % 2:
        sequence[-1] = 2
    return sequence


@dataclass
class Mailbox:
    """Places for the exchanges of one program over one set of mesh dims, collected while its code is written."""

    communicator: Communicator
    mesh_dims: tuple[str, ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    size: int = HEADER
    channels: int = 0
    workspace: torch.Tensor | None = None

    @staticmethod
    def of(program: Program, communicator: Communicator) -> Mailbox:
        """An empty one for a rank's program."""
        calls: dict[str, int] = {}
        for call in program.calls:
            calls[str(call.args[0])] = calls.get(str(call.args[0]), 0) + 1
        return Mailbox(communicator, calls=calls)

    def lower(self, block: str, node: fx.Node) -> tuple[PeerSend, PeerReceive] | None:
        """Modules that start and await an exchange of a block over symmetric memory; None if it does not fit."""
        target = node.target
        calls = self.calls.get(block, 0)
        if not isinstance(target, Reshuffle) or len(target.group) < 2 or calls < 2 or _escapes(node):
            return None
        if self.mesh_dims not in ((), target.mesh_dims) or (self.channels + 1) * SLOTS * len(target.group) > SIGNALS:
            return None
        dtype = node.meta[SPEC].dtype
        plans = [copies(target.exchange, member, dtype.itemsize) for member in range(len(target.group))]
        if max(len(plan) for plan in plans) > MOST_COPIES:
            return None
        self.mesh_dims = target.mesh_dims
        largest = max(math.prod(landing.shape) for landing in target.exchange.landings) * dtype.itemsize
        place = Place(
            self.communicator.group(target.mesh_dims).group_name,
            self.channels,
            tuple(self._reserve(largest) for _ in range(len(set(slot_sequence(calls))))),
        )
        self.channels += 1
        return PeerSend(place, plans), PeerReceive(place, target.exchange.shape)

    def _reserve(self, nbytes: int) -> int:
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + nbytes
        return start

    @property
    def group(self) -> str:
        """The name of the process group."""
        return str(self.communicator.group(self.mesh_dims).group_name)

    def open(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The workspace and the slot numbers, `arguments` of code that uses them; all ranks call this together."""
        from xdit_ir.transport.peer_ops import open_workspace  # registers operators, and needs CUDA

        self.workspace = open_workspace(self.size, device, self.group)
        return self.workspace, *(torch.tensor([slot]) for slot in range(SLOTS))

    def join(self) -> None:
        """Make the current stream wait for everything sent; at the end of a forward."""
        from xdit_ir.transport.peer_ops import join

        assert self.workspace is not None
        join(self.workspace, self.group)


@dataclass(frozen=True)
class Place:
    """Where an exchange happens: the group's name, its channel, and the byte offsets of its slots."""

    group: str
    channel: int
    slots: tuple[int, ...]


class PeerSend(nn.Module):
    """Start copying pieces to all members."""

    def __init__(self, place: Place, plans: Sequence[Sequence[Copy]]) -> None:
        super().__init__()
        self.place, self.tell_self = place, False
        self.plan = [
            number
            for member, plan in enumerate(plans)
            for copy in plan
            for number in (
                member,
                copy.source,
                copy.source_pitch,
                copy.target,
                copy.target_pitch,
                copy.width,
                copy.height,
            )
        ]

    def forward(
        self, x: torch.Tensor, workspace: torch.Tensor, slot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x`, this rank's part in the old layout -> what `PeerReceive` needs."""
        x = x.contiguous()
        place = self.place
        token = torch.ops.xdit_ir.peer_put(
            x, workspace, slot, place.group, place.channel, list(place.slots), self.plan, self.tell_self
        )
        return x, token


class PeerReceive(nn.Module):
    """Wait for the pieces of all members."""

    def __init__(self, place: Place, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.place, self.shape, self.sent = place, shape, False

    def forward(
        self,
        x: torch.Tensor,
        token: torch.Tensor,
        workspace: torch.Tensor,
        slot: torch.Tensor,
        *earlier: torch.Tensor,
    ) -> torch.Tensor:
        """What `PeerSend` gave -> this rank's part in the new layout, inside the workspace."""
        place = self.place
        result: torch.Tensor = torch.ops.xdit_ir.peer_wait(
            [x, *earlier],
            token,
            workspace,
            slot,
            place.group,
            place.channel,
            list(place.slots),
            list(self.shape),
            self.sent,
        )
        return result


@dataclass
class Custody:
    """Who keeps sent values in memory until they have left, as the code of one block is written.

    That something came from a member which it sent after it had received `x` proves that `x` has left. So a value is
    kept until the next exchange that starts after its own was awaited; behind the last one, flags tell.
    """

    kept: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    open: list[tuple[fx.Node, PeerSend, PeerReceive]] = field(default_factory=list)

    def start(self, node: fx.Node) -> None:
        """An exchange starts: its wait will keep what was awaited before."""
        self.kept[node] = [value for value, _, _ in self.open]
        self.open.clear()

    def wait(self, node: fx.Node, value: fx.Node, send: PeerSend, receive: PeerReceive) -> list[fx.Node]:
        """It is awaited, and `value` is what it sent; returns what else to keep until then."""
        self.open.append((value, send, receive))
        return self.kept.pop(node)

    def close(self) -> None:
        """The block ends."""
        for _, send, receive in self.open:
            send.tell_self = receive.sent = True
        self.open.clear()


def _escapes(node: fx.Node) -> bool:
    """Whether the block returns the exchanged value or a view of it."""
    return any(user.op == "output" or (_hands_on(user) and _escapes(user)) for user in node.users)


def _hands_on(node: fx.Node) -> bool:
    return ops.is_view(node.target) or ops.is_relayout(node.target)

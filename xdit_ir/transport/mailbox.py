"""Exchanges inside blocks over symmetric memory: who writes where, and why nothing is overwritten too early.

Every exchange of a block has slots in every member's workspace. A sender copies into the receiver's slot without
asking, and raises a flag there. That is safe because successive calls of a block take different slots: when a rank
writes to a slot for the second time it has waited, in the call between, for something that the receiver sent after
it had read that slot for the first time. It needs three things: slots alternate over the calls of a block and from
the last call of a forward to the first of the next (`slot_sequence`); every exchange is awaited inside the call that
started it; and its result is not returned from the block, which the pass `use-copy-engines` sees to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.collective_ops import PeerExchange
from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.ir.program import SPEC, Program, TensorSpec, called_block
from xdit_ir.transport.copies import Copy, copies
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.workspace import SLOTS


def slot_sequence(calls: int) -> list[int]:
    """The slot of each call of a block in one forward; neighbours differ, the last and the first too."""
    sequence = [call % 2 for call in range(calls)]
    if calls % 2:
        sequence[-1] = 2
    return sequence


@dataclass
class Mailbox:
    """The workspace of a rank's program in which exchanges over `mesh_dims` land; `size` in bytes, `calls` of each
    block."""

    communicator: Communicator
    mesh_dims: tuple[str, ...]
    calls: Mapping[str, int]
    size: int
    workspace: torch.Tensor | None = None

    @staticmethod
    def of(program: Program, communicator: Communicator) -> Mailbox | None:
        """That of a rank's program; None if nothing in it is exchanged over symmetric memory."""
        nodes = [node for block in program.blocks.values() for node in block.graph.nodes]
        found = [(node.target, node.meta[SPEC].dtype) for node in nodes if isinstance(node.target, PeerExchange)]
        if not found:
            return None
        size = max(target.slots[-1] + target.slot_size(dtype.itemsize) for target, dtype in found)
        return Mailbox(communicator, found[0][0].mesh_dims, Counter(map(called_block, program.calls)), size)

    def modules(self, node: fx.Node, target: PeerExchange) -> tuple[PeerSend, PeerReceive]:
        """Modules that start and await an exchange."""
        itemsize = node.meta[SPEC].dtype.itemsize
        plans = [copies(target.exchange, member, itemsize) for member in range(len(target.group))]
        patience = int(self.communicator.timeout.total_seconds() * 1e3)
        place = Place(self.group, target.channel, target.slots, patience)
        return PeerSend(place, plans), PeerReceive(place, node.meta[SPEC])

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
    """Where an exchange happens: the group's name, its channel, the byte offsets of its slots, and how many
    milliseconds it is waited for."""

    group: str
    channel: int
    slots: tuple[int, ...]
    patience: int


class PeerSend(FixedCall):
    """Start copying pieces to all members."""

    def __init__(self, place: Place, plans: Sequence[Sequence[Copy]]) -> None:
        super().__init__()
        self.place = place
        plan = tuple(number for member, copies in enumerate(plans) for copy in copies for number in (member, *copy.row))
        self.fixed = {
            "group": place.group,
            "channel": place.channel,
            "slots": place.slots,
            "plan": plan,
            "tell_self": False,
        }

    @staticmethod
    def function(
        x: torch.Tensor, workspace: torch.Tensor, slot: torch.Tensor, *after: torch.Tensor, **fixed: Any
    ) -> torch.Tensor:
        """`x`, this rank's part in the old layout, once `after` is there -> a token for `PeerReceive`, which keeps in
        memory what leaves."""
        token: torch.Tensor = torch.ops.xdit_ir.peer_put(x.contiguous(), list(after), workspace, slot, **fixed)
        return token


class PeerReceive(FixedCall):
    """Wait for the pieces of all members."""

    def __init__(self, place: Place, result: TensorSpec) -> None:
        super().__init__()
        self.fixed = {
            "group": place.group,
            "channel": place.channel,
            "slots": place.slots,
            "shape": result.shape,
            "dtype": result.dtype,
            "sent": False,
            "patience": place.patience,
        }

    @staticmethod
    def function(
        token: torch.Tensor, workspace: torch.Tensor, slot: torch.Tensor, *earlier: torch.Tensor, **fixed: Any
    ) -> torch.Tensor:
        """What `PeerSend` gave, here and `earlier` -> this rank's part in the new layout, inside the workspace."""
        result: torch.Tensor = torch.ops.xdit_ir.peer_wait([token, *earlier], workspace, slot, **fixed)
        return result


@dataclass
class Custody:
    """Who keeps tokens, and so what they stand for, until that has left, as the code of one block is written.

    That something came from a member which it sent after it had received `x` proves that `x` has left. So a token is
    kept until the next exchange that starts after its own was awaited; behind the last one, flags tell. This holds, and
    no two ranks wait for each other, as long as all start and await in the order in which the code is written. A
    compiler would change it, on each rank in its own way; so everything takes what is before it as an operand.
    """

    kept: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    open: list[tuple[fx.Node, PeerSend, PeerReceive]] = field(default_factory=list)
    latest: list[fx.Node] = field(default_factory=list)

    def start(self, token: fx.Node) -> None:
        """An exchange starts, after `latest`: its wait will keep what was awaited before."""
        self.kept[token] = [earlier for earlier, _, _ in self.open]
        self.open.clear()
        self.latest = [token]

    def wait(self, token: fx.Node, send: PeerSend, receive: PeerReceive) -> list[fx.Node]:
        """It is awaited; returns what else to keep until then, and what is before it."""
        self.open.append((token, send, receive))
        kept = self.kept.pop(token)
        return kept + [node for node in self.latest if node not in (token, *kept)]

    def waited(self, result: fx.Node) -> None:
        """The node that waits."""
        self.latest = [result]

    def close(self) -> None:
        """The block ends."""
        for _, send, receive in self.open:
            send.fixed["tell_self"] = receive.fixed["sent"] = True
        self.open.clear()

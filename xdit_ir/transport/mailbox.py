"""Exchanges inside blocks over symmetric memory: who writes where, and why nothing is overwritten too early.

Every exchange of a block has slots in every member's workspace. A sender copies into the receiver's slot without
asking, and raises a flag there. That is safe because successive calls of a block take different slots: when a rank
writes to a slot for the second time it has waited, in the call between, for something that the receiver sent after
it had read that slot for the first time. It needs three things: slots alternate over the calls of a block and from
the last call of a forward to the first of the next (`slot_sequence`); every exchange is awaited inside the call that
started it; and its result is not returned from the block, which the pass `use-copy-engines` sees to. Programs of
several shapes share a workspace: ranks meet where another one runs than before, see `Workspaces`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.collective_ops import PeerExchange
from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.ir.program import SPEC, Program, TensorSpec, called_block
from xdit_ir.transport.copies import copies
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.fetches import ongoing
from xdit_ir.transport.workspaces import Workspaces


def slot_sequence(calls: int) -> list[int]:
    """The slot of each call of a block in one forward; neighbours differ, the last and the first too."""
    sequence = [call % 2 for call in range(calls)]
    if calls % 2:
        sequence[-1] = 2
    return sequence


@dataclass(eq=False)
class Mailbox:
    """The workspace of a rank's program in which exchanges among `members` land; `size` in bytes, `calls` of each
    block.

    `places` are the exchanges of each block in the order in which they are written. Code names one by its number among
    these; what depends on sizes (where pieces lie, go and land) it is told by a letter, see `letter`.
    """

    communicator: Communicator
    members: tuple[int, ...]
    calls: Mapping[str, int]
    size: int
    workspace: torch.Tensor | None = None
    workspaces: Workspaces | None = None
    places: dict[str, list[Place]] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, communicator: Communicator) -> Mailbox | None:
        """That of a rank's program; None if nothing in it is exchanged over symmetric memory."""
        nodes = [node for block in program.blocks.values() for node in block.graph.nodes]
        found = [(node.target, node.meta[SPEC].dtype) for node in nodes if isinstance(node.target, PeerExchange)]
        if not found:
            return None
        size = max(target.slots[-1] + target.slot_size(dtype.itemsize) for target, dtype in found)
        return Mailbox(communicator, found[0][0].group, Counter(map(called_block, program.calls)), size)

    def modules(self, block: str, node: fx.Node, target: PeerExchange) -> tuple[PeerSend, PeerReceive]:
        """Modules that start and await an exchange of a block."""
        itemsize = node.meta[SPEC].dtype.itemsize
        plans = [copies(target.exchange, member, itemsize) for member in range(len(target.group))]
        rows = tuple(number for member, plan in enumerate(plans) for copy in plan for number in (member, *copy.row))
        place = Place(target.channel, target.slots, target.behind, rows)
        places = self.places.setdefault(block, [])
        places.append(place)
        patience = int(self.communicator.timeout.total_seconds() * 1e3)
        return (
            PeerSend(place, self.group, len(places) - 1),
            PeerReceive(self.group, len(places) - 1, node.meta[SPEC], patience),
        )

    @property
    def letters(self) -> list[tuple[str, int]]:
        """The block and the slot of each letter that code takes."""
        return [(block, slot) for block in self.places for slot in range(1 + max(slot_sequence(self.calls[block])))]

    def letter(self, block: str, slot: int) -> torch.Tensor:
        """What calls of a block that use this slot are told: the slot; for each place where what follows begins and
        ends; and that: its channel, the byte offset of the slot, what goes on behind it, and the rows of its plan."""
        tables = [(one.channel, one.slots[slot], one.behind, *one.plan) for one in self.places[block]]
        ends = list(itertools.accumulate(map(len, tables), initial=1 + 2 * len(tables)))
        bounds = itertools.chain.from_iterable(itertools.pairwise(ends))
        return torch.tensor([slot, *bounds, *itertools.chain.from_iterable(tables)])

    @property
    def group(self) -> str:
        """The name of the process group."""
        return str(self.communicator.among(self.members).group_name)

    @staticmethod
    def register() -> None:
        """Make the operators known that code calls."""
        import xdit_ir.transport.peer_ops  # noqa: F401

    def open(self, workspaces: Workspaces) -> tuple[torch.Tensor, ...]:
        """The workspace and the letters, `arguments` of code that uses them; all ranks call this together."""
        self.workspaces, self.workspace = workspaces, workspaces.take(self.size, self.group)
        return self.workspace, *(self.letter(block, slot) for block, slot in self.letters)

    def enter(self) -> None:
        """Before a forward, which all ranks begin in the same order."""
        assert self.workspaces is not None and self.workspace is not None
        ongoing(self.workspace.device).clear()  # what a forward that failed has left
        self.workspaces.enter(self.workspace, self.group, self)

    def join(self) -> None:
        """Make the current stream wait for everything sent; at the end of a forward."""
        from xdit_ir.transport.peer_ops import join

        assert self.workspace is not None
        join(self.workspace, self.group)


@dataclass(frozen=True)
class Place:
    """Where an exchange happens: its channel, the byte offsets of its slots, what goes on behind it (see
    `PeerExchange`), and what is copied: the numbers of a `Copy` for each, behind the member that gets it."""

    channel: int
    slots: tuple[int, ...]
    behind: int
    plan: tuple[int, ...]


class PeerSend(FixedCall):
    """Start copying pieces to all members."""

    def __init__(self, place: Place, group: str, number: int) -> None:
        super().__init__()
        self.place = place
        self.fixed = {"group": group, "place": number, "tell_self": False}

    @staticmethod
    def function(
        x: torch.Tensor, workspace: torch.Tensor, letter: torch.Tensor, *after: torch.Tensor, **fixed: Any
    ) -> torch.Tensor:
        """`x`, this rank's part in the old layout, once `after` is there -> a token for `PeerReceive`, which keeps in
        memory what leaves."""
        token: torch.Tensor = torch.ops.xdit_ir.peer_put(x.contiguous(), list(after), workspace, letter, **fixed)
        return token


class PeerReceive(FixedCall):
    """Wait for the pieces of all members."""

    def __init__(self, group: str, number: int, result: TensorSpec, patience: int) -> None:
        super().__init__()
        self.fixed = {"group": group, "place": number, "shape": result.shape, "dtype": result.dtype}
        self.fixed |= {"sent": False, "patience": patience}

    @staticmethod
    def function(
        token: torch.Tensor, workspace: torch.Tensor, letter: torch.Tensor, *earlier: torch.Tensor, **fixed: Any
    ) -> torch.Tensor:
        """What `PeerSend` gave, here and `earlier` -> this rank's part in the new layout, inside the workspace."""
        result: torch.Tensor = torch.ops.xdit_ir.peer_wait([token, *earlier], workspace, letter, **fixed)
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

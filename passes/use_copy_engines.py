"""`use-copy-engines`: exchanges inside blocks by the GPUs' copy engines instead of collectives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import PeerExchange, Reshuffle
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph, takers
from xdit_ir.ir.program import SPEC, Program, called_block
from xdit_ir.transport.copies import copies
from xdit_ir.transport.mailbox import slot_sequence
from xdit_ir.transport.workspace import HEADER, SIGNALS, SLOTS

ALIGNMENT = 512
MOST_COPIES = 16  # per peer; an exchange in smaller pieces is left to a collective


@dataclass(frozen=True)
class UseCopyEngines:
    """Give exchanges of blocks places in a workspace that all ranks see, into which copy engines write while the GPU
    computes: of blocks that are called twice or more, over one set of mesh dims, in few rectangular copies, whose
    result the block does not return. The others stay collectives. See `xdit_ir.transport.mailbox`.

    `agreed`: those that all ranks can have, as `candidates` names them, joined by `+`; empty: all that this rank can.
    """

    name: ClassVar[str] = "use-copy-engines"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    agreed: str = ""

    def apply(self, program: Program) -> Program:
        """The program with such exchanges as `PeerExchange`."""
        calls = Counter(map(called_block, program.calls))
        blocks = {
            name: dataclasses.replace(block, graph=copy_graph(block.graph)) for name, block in program.blocks.items()
        }
        places, able = _Places(), _able(program.replace(blocks=blocks))
        for name in self.agreed.split("+") if self.agreed else able:
            node = able[name]
            if places.has_room(node):
                node.target = places.lowered(node, len(set(slot_sequence(calls[name.rpartition(".")[0]]))))
        return program.replace(blocks=blocks)


def candidates(program: Program) -> list[str]:
    """The exchanges of a rank's program that copy engines can do, as `block.node`."""
    return list(_able(program))


def _able(program: Program) -> dict[str, fx.Node]:
    calls = Counter(map(called_block, program.calls))
    found = ((name, node) for name, block in program.blocks.items() if calls[name] > 1 for node in block.graph.nodes)
    return {f"{name}.{node.name}": node for name, node in found if _fits(node)}


def _fits(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, Reshuffle) or len(target.group) < 2 or _escapes(node):
        return False
    itemsize = node.meta[SPEC].dtype.itemsize
    members = range(len(target.group))
    return max(len(copies(target.exchange, member, itemsize)) for member in members) <= MOST_COPIES


@dataclass
class _Places:
    """What is taken of the workspace: channels, and bytes up to `size`; all exchanges are over the same mesh dims."""

    mesh_dims: tuple[str, ...] = ()
    channels: int = 0
    size: int = HEADER

    def has_room(self, node: fx.Node) -> bool:
        """Whether an exchange can have places beside those that have some."""
        target = node.target
        assert isinstance(target, Reshuffle)
        room = (self.channels + 1) * SLOTS * len(target.group) <= SIGNALS
        return room and self.mesh_dims in ((), target.mesh_dims)

    def lowered(self, node: fx.Node, slots: int) -> PeerExchange:
        """The target of such a node, with a channel and places of its own."""
        target = node.target
        assert isinstance(target, Reshuffle)
        given = {one.name: getattr(target, one.name) for one in dataclasses.fields(target)}
        found = PeerExchange(**given, channel=self.channels, slots=())
        size = found.slot_size(node.meta[SPEC].dtype.itemsize)
        self.mesh_dims, self.channels = target.mesh_dims, self.channels + 1
        return dataclasses.replace(found, slots=tuple(self._reserve(size) for _ in range(slots)))

    def _reserve(self, nbytes: int) -> int:
        start = -(-self.size // ALIGNMENT) * ALIGNMENT
        self.size = start + nbytes
        return start


def _escapes(node: fx.Node) -> bool:
    """Whether the block returns the exchanged value or a view of it."""
    return any(user.op == "output" for user in takers(node, lambda user: ops.is_view(user.target)))

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
from xdit_ir.ir.graphs import copy_graph
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
    """

    name: ClassVar[str] = "use-copy-engines"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program with such exchanges as `PeerExchange`."""
        calls = Counter(map(called_block, program.calls))
        places, blocks = _Places(), {}
        for name, block in program.blocks.items():
            graph = copy_graph(block.graph)
            for node in graph.nodes if calls[name] > 1 else ():
                if places.can_have(node):
                    node.target = places.lowered(node, len(set(slot_sequence(calls[name]))))
            blocks[name] = dataclasses.replace(block, graph=graph)
        return program.replace(blocks=blocks)


@dataclass
class _Places:
    """What is taken of the workspace: channels, and bytes up to `size`; all exchanges are over the same mesh dims."""

    mesh_dims: tuple[str, ...] = ()
    channels: int = 0
    size: int = HEADER

    def can_have(self, node: fx.Node) -> bool:
        """Whether a node is an exchange that can go over the workspace."""
        target = node.target
        if not isinstance(target, Reshuffle) or len(target.group) < 2 or _escapes(node):
            return False
        if self.mesh_dims not in ((), target.mesh_dims) or (self.channels + 1) * SLOTS * len(target.group) > SIGNALS:
            return False
        itemsize = node.meta[SPEC].dtype.itemsize
        members = range(len(target.group))
        return max(len(copies(target.exchange, member, itemsize)) for member in members) <= MOST_COPIES

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
    return any(user.op == "output" or (ops.is_view(user.target) and _escapes(user)) for user in node.users)

"""`share-branches`: independent parts of the outer graph, such as the tiles of a decoder, are shared out over ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs, copy_node
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program, Seeding, TensorSpec
from xdit_ir.passes.emit import Emitter
from xdit_ir.rules.convolutions import RULES as CONVOLUTIONS
from xdit_ir.sharding.branches import Branches, Sharing
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.shared_out import STACK

aten = torch.ops.aten
UNEVEN = 1.5  # times an even part of the work: where the slowest rank has more, the parts are too few
Shared = dict[TensorSpec, list[tuple[fx.Node, int]]]


@dataclass(frozen=True)
class ShareBranches:
    """Where the work falls apart into parts of which none needs another's results (tiles, samples decoded one by one,
    networks side by side), there are enough of them for all ranks, and dividing each over all ranks would take longer,
    each rank computes whole parts.

    What they give is stacked, and the stack divided by seeds, then gathered; all that follows is done by every rank.
    That a rank computes nothing else follows from data flow: it is given no part of the stack that it does not keep.
    Compared are the slowest rank's whole parts and the exchange of results with an even division of the work in which
    every convolution and attention waits for an exchange.
    """

    name: ClassVar[str] = "share-branches"
    numerics: ClassVar[str] = "exact"

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with results stacked and seeds for the stacks, or as it was."""
        count = self.mesh.size(SEQUENCE)
        if count == 1 or program.seeding is not None:
            return program
        branches = Branches.of(program)
        sharing = branches.shared(count)
        if sharing is None or sharing.slowest * count > UNEVEN * branches.total:
            return program
        if self._seconds(sharing) > self._divided_seconds(program, branches):
            return program
        return self._written(program, branches, sharing)

    def _seconds(self, sharing: Sharing) -> float:
        """Time of the slowest rank, and of bringing the results to all."""
        sent = max(sum(end.meta[SPEC].nbytes for end in ends) for ends in sharing.ranks) * (len(sharing.ranks) - 1)
        kinds = len(_by_type(sharing))
        return self.machine.seconds(sharing.slowest, sent) + kinds * self.machine.latency

    def _divided_seconds(self, program: Program, branches: Branches) -> float:
        """Time of each rank if the work were divided evenly inside."""
        waits = sum(times * sum(map(_waits, graph.nodes)) for _, graph, times in all_graphs(program))
        return self.machine.seconds(branches.total / self.mesh.size(SEQUENCE), 0) + waits * self.machine.latency

    def _written(self, program: Program, branches: Branches, sharing: Sharing) -> Program:
        """The program in the order: the work, the stacks of its results, all that is made of these."""
        graph, env, seeds = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, tuple[Layout, ...]]()
        nodes = list(program.graph.nodes)
        front = [node for node in nodes if node in branches.work or node.op in ("placeholder", "get_attr")]
        for node in front:
            env[node] = copy_node(graph, node, env.__getitem__)
        behind = dict(env)
        for given in _by_type(sharing).values():
            emitter = Emitter(graph, env[given[0][0]], program.mesh, before=graph._root)
            stack = emitter.emit(STACK, [env[end] for end, _ in given], 0, name=f"{given[0][0].name}_all")
            whole = stack.meta.get(LAYOUT) or Layout.whole(len(stack.meta[SPEC].shape))
            parts = self._parts([rank for _, rank in given])
            seeds[stack.name] = (whole.with_dims({0: parts}), whole)
            for place, (end, _) in enumerate(given):
                behind[end] = emitter.emit(aten.select.int, stack, 0, place, name=f"{end.name}_shared")
        made = set(front)
        for node in nodes:
            if node not in made:
                behind[node] = copy_node(graph, node, behind.__getitem__)
        return program.replace(graph=graph, seeding=Seeding(self.mesh, seeds))

    def _parts(self, owners: list[int]) -> Partition:
        """Which places of a stack each rank keeps: those that it owns, which are one behind the other."""
        starts = [sum(owner < one for owner in owners) for one in range(self.mesh.size(SEQUENCE) + 1)]
        pieces = [Indices.range(start, end) for start, end in itertools.pairwise(starts)]
        places = (self.mesh.index(rank, SEQUENCE) for rank in range(self.mesh.world_size))
        return Partition(len(owners), tuple(pieces[place] for place in places))


def _by_type(sharing: Sharing) -> Shared:
    """Results that can be stacked, with the ranks that compute them, in the order of ranks."""
    found: Shared = {}
    for rank, ends in enumerate(sharing.ranks):
        for end in ends:
            found.setdefault(end.meta[SPEC], []).append((end, rank))
    return found


def _waits(node: fx.Node) -> bool:
    """Whether an operator mixes places of what is divided."""
    return node.target in ops.ATTENTIONS or getattr(node.target, "overloadpacket", None) in CONVOLUTIONS

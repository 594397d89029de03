"""`pack-exchanges`: exchanges that are ready at the same place become one."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from xdit_ir.ir.collective_ops import Reshuffle, Together
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs, copy_graph
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.transport.packing import PACKED

Pack = list[fx.Node]


@dataclass(frozen=True)
class PackExchanges:
    """Exchanges of one kind, along the same mesh dims and of one type, of which none is needed before the last one
    starts, become one exchange of several values: queries, keys and values of an attention, say. That is for where it
    costs the host time to start one; in a CUDA graph they go better one by one, each under other work.

    `agreed`: those that all ranks can pack, as `packs` names them, joined by `/`; empty: all that this rank can.
    """

    name: ClassVar[str] = "pack-exchanges"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    agreed: str = ""

    def apply(self, program: Program) -> Program:
        """The program with such exchanges as `Together`."""
        wanted = self.agreed.split("/") if self.agreed else packs(program)
        blocks = {
            name: dataclasses.replace(block, graph=copy_graph(block.graph)) for name, block in program.blocks.items()
        }
        packed = program.replace(graph=copy_graph(program.graph), blocks=blocks)
        for name, pack in list(_named(packed)):
            if name in wanted:
                _join(pack)
        return packed


def packs(program: Program) -> list[str]:
    """The exchanges of a rank's program that can be packed, as `block.first+second`; nothing before the dot for those
    of the outer graph."""
    return [name for name, _ in _named(program)]


def _named(program: Program) -> Iterator[tuple[str, Pack]]:
    for block, graph, _ in all_graphs(program):
        for pack in _found(graph):
            yield f"{block}.{'+'.join(node.name for node in pack)}", pack


def _found(graph: fx.Graph) -> Iterator[Pack]:
    """Exchanges that can start where the last one of them does: nothing before that uses what one of them brings."""
    waiting: dict[Hashable, Pack] = {}
    for node in graph.nodes:
        for key in [key for key, pack in waiting.items() if any(source in pack for source in node.all_input_nodes)]:
            yield from _if_several(waiting.pop(key))
        if type(node.target) is Reshuffle and len(node.target.group) > 1 and node.meta[SPEC].dtype in PACKED:
            target = node.target
            waiting.setdefault((target.kind, target.mesh_dims, node.meta[SPEC].dtype), []).append(node)
    for pack in waiting.values():
        yield from _if_several(pack)


def _if_several(pack: Pack) -> Iterator[Pack]:
    if len(pack) > 1:
        yield pack


def _join(pack: Sequence[fx.Node]) -> None:
    """One exchange where the last one stands; each result is picked where it is needed first, as that waits for it."""
    last = pack[-1]
    target = last.target
    assert isinstance(target, Reshuffle)
    exchanges = tuple(node.target.exchange for node in pack if isinstance(node.target, Reshuffle))
    together = Together(target.kind, target.mesh_dims, target.group, exchanges)
    with last.graph.inserting_before(last):
        joined = last.graph.call_function(together, tuple(node.args[0] for node in pack))
    joined.meta = dict(last.meta) | {SPEC: tuple(node.meta[SPEC] for node in pack)}
    for place, node in enumerate(pack):
        node.target, node.args = operator.getitem, (joined, place)
        if node.users:
            min(node.users).prepend(node)
        else:  # this rank takes part for others only
            node.graph.erase_node(node)

"""`reuse-region`: note which values a step cache watches, and what it may take from an earlier step."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from xdit_ir.caching.region import find_region
from xdit_ir.caching.rule import Watched
from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import copy_graph
from xdit_ir.ir.program import SPEC, WHERE, Program


@dataclass(frozen=True)
class ReuseRegion:
    """Behind what decides whether a region of blocks is computed stands `watch`, behind what leaves the region `reuse`.
    Both give what they get: a rank has one program that computes the region, and one that takes what was kept. The
    region begins at the first block, or behind it where `watch` is "first-block", and ends with the last one.
    """

    name: ClassVar[str] = "reuse-region"
    numerics: ClassVar[str] = "stale"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})

    watch: str = Watched.FIRST_BLOCK.value

    def apply(self, program: Program) -> Program:
        """The program with the region's ends noted."""
        program = program.replace(graph=copy_graph(program.graph))
        region = find_region(program, Watched(self.watch))
        for node, stream in region.results.items():
            made = _behind(node, ops.reuse, *([] if stream is None else [stream]))
            for user in [user for user in node.users if user in region.rest]:
                user.replace_input_with(node, made)
        for node, before in region.watched:
            made = _behind(node, ops.watch, *([] if before is None else [before]))
            for user in [user for user in node.users if user is not made]:
                user.replace_input_with(node, made)
        return program


def _behind(node: fx.Node, target: Any, *further: fx.Node) -> fx.Node:
    last = node
    while last.next.target is operator.getitem and last.next.args[0] in node.args:  # results of a call stay together
        last = last.next
    with node.graph.inserting_after(last):
        made = node.graph.create_node("call_function", target, (node, *further), name=f"{node.name}_{target.__name__}")
    made.meta = {key: node.meta[key] for key in (SPEC, WHERE) if key in node.meta}
    return made

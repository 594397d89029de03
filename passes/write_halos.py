"""Writes a graph anew with halos fetched ahead of its segments."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import copy_node, operands, remove_dead, results_of, write_relayout
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import LAYOUT
from xdit_ir.ir.relayout import kind
from xdit_ir.passes.halo_segments import Segment, SpacedGraph
from xdit_ir.passes.widening import is_halo


def write(region: SpacedGraph, segments: Sequence[Segment], given: Mapping[fx.Node, Any]) -> fx.Graph:
    """The graph whose operators make what their segments say; `given` are the layouts of arguments and of the results
    of block calls, which others decide."""
    return _Writer(region, given).write(segments)


class _Writer:
    def __init__(self, region: SpacedGraph, given: Mapping[fx.Node, Any]) -> None:
        self.region, self.given, self.graph = region, given, fx.Graph()
        self.mesh, self.holds = region.widening.mesh, region.widening.holds
        # Of every value of the source graph the layouts in which it is there, the one that it is made in first.
        self.there: dict[fx.Node, list[fx.Node]] = {}

    def write(self, segments: Sequence[Segment]) -> fx.Graph:
        for segment in segments:
            for node in self.region.nodes[segment.start : segment.stop]:
                self.there[node] = [self._written(node, segment)]
        asked = self.region.around.asked
        results = [(node, asked.get(node, node.meta[LAYOUT])) for node in results_of(self.region.graph)]
        output, last = self.region.graph.output_node(), segments[-1]
        values = iter([self._brought(node, layout, last) for node, layout in results])
        args = fx.map_arg(output.args, lambda _: next(values))
        self.graph.create_node("output", output.target, args, name=output.name).meta.update(output.meta)
        remove_dead(self.graph)
        return self.graph

    def _written(self, node: fx.Node, segment: Segment) -> fx.Node:
        made = self.given.get(node) or segment.made.get(node, node.meta[LAYOUT])
        if node.target is ops.shard or is_halo(node):
            return self._brought(operands(node)[0], made, segment)
        if node.target is operator.getitem:
            values = [self.there[operands(node)[0]][0]]
            made = values[0].meta[LAYOUT][node.args[1]]
        else:
            taken = segment.taken.get(node, ())
            values = [self._brought(*pair, segment) for pair in zip(operands(node), taken, strict=True)]
        feed = iter(values)
        new = copy_node(self.graph, node, lambda _: next(feed))
        new.meta[LAYOUT] = made
        return new

    def _brought(self, node: fx.Node, want: Layout, segment: Segment) -> fx.Node:
        """A value in this layout, out of one in which it is there, or of an exchange where ranks lack something."""
        there = self.there[node]
        for one in there:
            if one.meta[LAYOUT] == want:
                return one
        holder = next((one for one in there if self.holds(one.meta[LAYOUT], want)), None)
        if holder is None:
            ahead = segment.fetched.get(node, want)
            ahead = ahead if self.holds(ahead, want) else want
            source = next((one for one in there if self.holds(ahead, one.meta[LAYOUT])), None)
            usual: Layout = node.meta[LAYOUT]
            if source is None:
                able = any(self.holds(one.meta[LAYOUT], usual) for one in there)
                source = self._brought(node, usual, segment) if able else there[0]
            holder = self._changed(source, ahead)
            there.append(holder)
        if holder.meta[LAYOUT] == want:
            return holder
        there.append(self._changed(holder, want))
        return there[-1]

    def _changed(self, value: fx.Node, want: Layout) -> fx.Node:
        target = ops.RELAYOUTS[kind(self.mesh, value.meta[LAYOUT], want)[0]]
        return write_relayout(self.graph, value, target, want)

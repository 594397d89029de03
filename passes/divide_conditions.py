"""`divide-conditions`: projections of what conditions all tokens are made before the blocks, each rank its features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import operands, placeholders, results_of
from xdit_ir.ir.hoist import Hoisted, ancestors, early_inputs, hoist
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.program import (
    LAYOUT,
    SPEC,
    Block,
    Program,
    TensorSpec,
    call_parts,
    called_block,
    is_block_call,
    is_weight,
)
from xdit_ir.passes.emit import Emitter, layout_of
from xdit_ir.sharding.cost import local_flops
from xdit_ir.sharding.machine import Machine

aten = torch.ops.aten
Projections = Mapping[str, list[fx.Node]]


@dataclass(frozen=True)
class DivideConditions:
    """Modulations and the like: every block projects the same few rows (of the timestep's embedding, say), so the time
    is that of reading its weights, on every rank. Where it pays, these projections of all blocks are made before the
    first one, each rank reads the weights of its part of the features, and all parts are exchanged at once. With
    divided features, so that ranks hold parts of weights, that is done for all of them.

    `paired`: the parts of `cfg` run different calls, whose conditions differ, so they share nothing.
    """

    name: ClassVar[str] = "divide-conditions"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.RUNNABLE})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)
    paired: bool = False

    @property
    def dims(self) -> tuple[str, ...]:
        """The mesh dims along which ranks run the same call."""
        return self.mesh.dims_of_a_call(paired=self.paired)

    @property
    def saves_memory(self) -> bool:
        """Whether ranks shall hold parts of weights even where that takes longer."""
        return self.mesh.size(FEATURES) > 1

    def apply(self, program: Program) -> Program:
        """The program with these projections taken out of its blocks and divided over all ranks of a call."""
        early = early_inputs(program)
        chosen = {name: self._projections(block, early.get(name, set())) for name, block in program.blocks.items()}
        chosen = {name: found for name, found in chosen.items() if found}
        called = [called_block(call) for call in program.calls if called_block(call) in chosen]
        if not called or (self._saved(chosen, called) <= 0 and not self.saves_memory):
            return program
        hoisted, made = hoist(program, chosen, "conditions")
        for name, found in chosen.items():
            _divide(hoisted.blocks[f"{name}_conditions"].graph, [node.name for node in found], self.mesh, self.dims)
        _Exchange(hoisted, self.mesh, made).write()
        return hoisted

    def _projections(self, block: Block, early: set[fx.Node]) -> list[fx.Node]:
        """Linear operators of a body that depend on nothing but early inputs, and wait for weights."""
        known, found = set(early), []
        for node in block.graph.nodes:
            local = node.op == "call_function" and not ops.is_relayout(node.target)
            if node.op == "get_attr" or (local and all(source in known for source in operands(node))):
                known.add(node)
                if node.op == "call_function" and self._waits_for_weights(node):
                    found.append(node)
        before = ancestors(source for node in found for source in operands(node))
        return [node for node in found if node not in before]

    def _waits_for_weights(self, node: fx.Node) -> bool:
        if node.target is not aten.linear.default or not all(map(is_weight, operands(node)[1:])):
            return False
        if is_weight(operands(node)[0]) or not all(one.meta[LAYOUT].is_whole for one in operands(node)[1:]):
            return False
        if node.meta[SPEC].shape[-1] < self.mesh.size(self.dims):
            return False
        return self._gain(node) > 0 or (self.saves_memory and is_condition(node))

    def _gain(self, node: fx.Node) -> float:
        """Seconds saved by one projection if all ranks share it, its part of the exchange included."""
        weights: int = sum(weight.meta[SPEC].nbytes for weight in operands(node)[1:])
        flops, whole = max(local_flops(node, self.mesh)), max(local_flops(node, None))
        count, out = self.mesh.size(self.dims), node.meta[SPEC].nbytes
        made, dtype = math.prod(node.meta[SPEC].shape), node.meta[SPEC].dtype
        now = self.machine.projection_seconds(flops, made, weights, dtype)
        then = self.machine.projection_seconds(whole / count, made / count, weights / count, dtype)
        return now - then - self.machine.sending(self.mesh, self.dims, [out / count] * self.mesh.world_size)

    def _saved(self, projections: Projections, called: Sequence[str]) -> float:
        """Seconds, after one exchange of all results and one of each condition."""
        total = sum(self._gain(node) for name in called for node in projections[name])
        return total - 2 * self.machine.start(self.mesh, self.dims)


def is_condition(node: fx.Node) -> bool:
    """Whether an operator projects a few rows: its weights are more than what it takes and makes."""
    if node.target is not aten.linear.default or not is_weight(operands(node)[1]):
        return False
    x, weight = (one.meta[SPEC].nbytes for one in operands(node)[:2])
    return bool(x + node.meta[SPEC].nbytes < weight)


def _divide(body: fx.Graph, names: Sequence[str], mesh: Mesh, dims: Sequence[str]) -> None:
    """Make the projections of these names project to each rank's part of the features; all else is whole."""
    for node in list(body.nodes):
        if node.name in names:
            features = mesh.divide(node.meta[SPEC].shape[-1], dims)
            for weight in operands(node)[1:]:
                part = Emitter(body, node, mesh).relayout(weight, weight.meta[LAYOUT].with_dims({0: features}))
                node.replace_input_with(weight, part)
        if node.op != "output" and node.target is not ops.shard:
            node.meta[LAYOUT] = layout_of(node, mesh)


class _Exchange:
    """Gives whole conditions to the hoisted calls, and brings what they make to the blocks, all at once."""

    def __init__(self, program: Program, mesh: Mesh, made: Hoisted) -> None:
        self.program, self.mesh, self.made, self.graph = program, mesh, made, program.graph
        self.whole: dict[fx.Node, fx.Node] = {}

    def write(self) -> None:
        """Rewrite the outer graph."""
        parts = [part for call in self.made for part in self._called(call)]
        wanted: dict[fx.Node, Layout] = {}
        for part in parts:
            block = next(user for user in part.users if is_block_call(user))
            inputs = placeholders(self.program.blocks[called_block(block)].graph)
            wanted[part] = inputs[operands(block).index(part)].meta[LAYOUT]
        alike: dict[object, list[fx.Node]] = {}
        for part in parts:
            spec: TensorSpec = part.meta[SPEC]
            alike.setdefault((spec.shape[:-1], spec.dtype, wanted[part].dims[:-1]), []).append(part)
        behind = parts[-1].next
        for group in alike.values():
            self._exchange(Emitter(self.graph, group[0], self.mesh, behind), group, wanted[group[0]])

    def _called(self, call: fx.Node) -> list[fx.Node]:
        """The results of a hoisted call, which gets its conditions whole."""
        name, prefix, values, weights = call_parts(call)
        call.args = (name, prefix, [self._gathered(value, call) for value in values], weights)
        results = results_of(self.program.blocks[name].graph)
        call.meta[LAYOUT] = tuple(result.meta[LAYOUT] for result in results)
        for part, result in zip(self.made[call], results, strict=True):
            part.meta[LAYOUT] = result.meta[LAYOUT]
        return self.made[call]

    def _gathered(self, value: fx.Node, call: fx.Node) -> fx.Node:
        if value not in self.whole:
            whole = Layout.whole(len(value.meta[SPEC].shape))
            self.whole[value] = Emitter(self.graph, call, self.mesh).relayout(value, whole)
        return self.whole[value]

    def _exchange(self, emitter: Emitter, parts: list[fx.Node], wanted: Layout) -> None:
        """Exchange results that differ in their features only as one value, and cut it again."""
        joined = emitter.emit(aten.cat.default, parts, -1, name="conditions")
        whole, start = emitter.relayout(joined, wanted), 0
        for part in parts:
            *outer, width = part.meta[SPEC].shape
            one = emitter.emit(aten.slice.Tensor, whole, len(outer), start, start + width)
            part.replace_all_uses_with(one, delete_user_cb=is_block_call)
            start += width

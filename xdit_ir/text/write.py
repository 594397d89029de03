"""The complete text of a program, from which `parse` makes an equal one.

It is the printed form (`xdit_ir.ir.printer`, with bodies) and what that leaves out: origins, exact partitions, weights,
constants, token streams, the signature. See docs/ir.md for the grammar.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import arguments_of, results_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import call_text, mesh_text
from xdit_ir.ir.program import (
    CONSTANT,
    LAYOUT,
    SCOPE,
    SPEC,
    STAGE,
    WEIGHT,
    Program,
    Seeding,
    Stored,
    TensorSpec,
    TokenAxis,
    Where,
    call_parts,
    called_block,
    is_block_call,
    is_weight,
    qualified,
    scope_of,
    where_of,
)
from xdit_ir.ir.stored import held_spec
from xdit_ir.sharding.layout_graph import FALLBACK
from xdit_ir.text.attachments import Collected
from xdit_ir.text.literals import LiteralWriter, name_text
from xdit_ir.text.signature import no_signature, write_signature
from xdit_ir.text.targets import target_text
from xdit_ir.text.types import TypeWriter, partition_text


@dataclass(frozen=True, eq=False)
class Document:
    """A program as text, and what the text refers to: large tensors by hash, opaque objects by name."""

    text: str
    attachments: Mapping[str, Any]


def write(program: Program) -> Document:
    """The complete text of a program."""
    collected, types = Collected(), TypeWriter(program.mesh if program.seeding is None else program.seeding.mesh)
    over = "" if program.mesh is None else f" on {mesh_text(program.mesh)}"
    outer = GraphText(program, program.graph, collected, types, [""])
    sections = [[f"program {program.name}{over} {{", *outer.inputs(), *outer.lines(), "}"]]
    for name, block in program.blocks.items():
        prefixes = [call_parts(node)[1] for node in program.calls if node.args[0] == name]
        body = GraphText(program, block.graph, collected, types, prefixes)
        sections.append([f"block {name}({body.parameters()}) {{", *body.lines(), "}"])
    sections += _tables(program, collected, types)
    return Document("\n\n".join("\n".join(lines) for lines in sections) + "\n", collected.found)


def _tables(program: Program, collected: Collected, types: TypeWriter) -> Iterator[list[str]]:
    literal, plain = LiteralWriter(collected), TypeWriter(None)
    if program.device != torch.device("cpu"):
        yield [f"device {literal(program.device)}"]
    if program.facts != usual_facts(program.mesh):
        yield [f"facts {', '.join(fact.value for fact in Fact if fact in program.facts)}".rstrip()]
    if program.coordinates:
        yield [f"coordinates {literal(program.coordinates)}"]
    if program.state:
        yield ["weights {", *(f"  {name_text(name)}: {plain(spec, None)}" for name, spec in program.state.items()), "}"]
    if program.stored:
        yield [
            "stored {",
            *(f"  {_stored_text(name, one, plain, literal)}" for name, one in program.stored.items()),
            "}",
        ]
    for section, tensors in (("constants", program.constants), ("contents", program.contents)):
        if tensors:
            yield [f"{section} {{", *(f"  {name_text(name)} = {literal(x)}" for name, x in tensors.items()), "}"]
    if program.tokens:
        yield ["tokens {", *(f"  {_token_text(axis)}" for axis in program.tokens), "}"]
    if program.seeding is not None:
        yield [f"seeds on {mesh_text(program.seeding.mesh)} {{", *_seed_lines(program, program.seeding, types), "}"]

    def graph(part: fx.Graph) -> list[str]:
        writer = GraphText(program, part, collected, types, [])
        return [*writer.inputs(), *writer.lines()]

    if program.signature != no_signature():
        yield ["signature {", *write_signature(program.signature, literal, graph), "}"]
    if types.numbers:
        listed = (f"  #{number}: {partition_text(partition)}" for partition, number in types.numbers.items())
        yield ["partitions {", *listed, "}"]


def _stored_text(name: str, stored: Stored, types: TypeWriter, literal: LiteralWriter) -> str:
    text = f"{name_text(name)}: {types(stored.spec, None)} = {literal(dict(stored.members))}"
    text += " on host" if stored.on_host else ""
    return text if stored.held is None else f"{text} held {literal(stored.held)}"


def _token_text(axis: TokenAxis) -> str:
    text = f"%{axis.value} dim {axis.dim} of {axis.size}"
    text += f" units {list(axis.units)}" if axis.units else ""
    text += f" segments {[list(one) for one in axis.segments]}" if axis.segments else ""
    return text + (" gathered" if axis.is_context else "")


def reference(node: fx.Node) -> str:
    """The name of a parameter, buffer or constant in the model, or relative to a call's prefix."""
    return str(node.meta.get(WEIGHT, node.target))


def _seed_lines(program: Program, seeding: Seeding, types: TypeWriter) -> Iterator[str]:
    specs = {node.name: node.meta[SPEC] for node in program.graph.nodes if node.name in seeding.seeds}
    for name, layouts in seeding.seeds.items():
        yield f"  %{name}: {', '.join(types(specs[name], layout) for layout in layouts)}"


def usual_facts(mesh: Mesh | None) -> frozenset[Fact]:
    """What is true of a program whose text does not say: on a mesh, that it has layouts."""
    return frozenset() if mesh is None else frozenset({Fact.LAYOUTS})


def usual_name(target: str) -> str:
    """What the node of a parameter, buffer or constant is called unless its line says otherwise."""
    return target.removeprefix(f"{CONSTANT}.").replace(".", "_")


class GraphText:
    """One graph. References to parameters stand where they are used, unless there is more to say about them."""

    def __init__(
        self, program: Program, graph: fx.Graph, collected: Collected, types: TypeWriter, prefixes: list[str]
    ) -> None:
        self.program, self.graph, self.types, self.prefixes = program, graph, types, prefixes
        self.collected = collected
        self.literal = LiteralWriter(collected, self._reference)
        attributes = [node for node in graph.nodes if is_weight(node)]
        targets = Counter(map(reference, attributes))
        self.inline = {n for n in attributes if targets[reference(n)] == 1 and n.users and self._is_usual(n)}

    def _is_usual(self, node: fx.Node) -> bool:
        spec = state_spec(self.program, reference(node), self.prefixes)
        usual = node.name == usual_name(reference(node)) and node.meta.get(SPEC) == spec
        return usual and not clauses(node, origin=False) and is_usual_layout(node, self.program.layout_mesh)

    def _reference(self, value: Any) -> str | None:
        if not isinstance(value, fx.Node):
            return None
        return f"@{name_text(reference(value))}" if value in self.inline else f"%{value.name}"

    def _typed(self, node: fx.Node) -> str:
        if SPEC not in node.meta:
            return f"%{node.name}"
        return f"%{node.name}: {self.types(node.meta[SPEC], node.meta.get(LAYOUT))}"

    def parameters(self) -> str:
        """The inputs in one line."""
        return ", ".join(self._typed(node) + clauses(node) for node in arguments_of(self.graph))

    def inputs(self) -> Iterator[str]:
        """The inputs, one a line."""
        yield from (f"  input {self._typed(node)}{clauses(node)}" for node in arguments_of(self.graph))

    def lines(self) -> Iterator[str]:
        """Everything else, one node a line."""
        for node in self.graph.nodes:
            if (node.op != "placeholder" or WEIGHT in node.meta) and node not in self.inline:
                yield f"  {self._line(node)}{clauses(node)}"

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            values = node.args[0]
            return f"return {', '.join(map(self.literal, values if isinstance(values, tuple) else [values]))}"
        if is_weight(node):
            return f"{self._typed(node)} = @{name_text(reference(node))}"
        if node.target is operator.getitem:
            return f"{self._typed(node)} = {self.literal(node.args[0])}[{node.args[1]}]"
        if is_block_call(node):
            head = f"%{node.name}" if self._is_as_body(node, called_block(node)) else self._typed(node)
            return f"{head} = {call_text(node, self.literal)}"
        given = [*map(self.literal, node.args), *(f"{key}={self.literal(item)}" for key, item in node.kwargs.items())]
        target = target_text(node.target) or self.literal(node.target)
        return f"{self._typed(node)} = {target}({', '.join(given)})"

    def _is_as_body(self, node: fx.Node, name: str) -> bool:
        return (node.meta.get(SPEC), node.meta.get(LAYOUT)) == result_types(self.program.blocks[name].graph)


def result_types(graph: fx.Graph) -> tuple[Any, Any]:
    """Types and layouts (None without) of what a body returns."""
    results = results_of(graph)
    layouts = tuple(value.meta.get(LAYOUT) for value in results)
    return tuple(value.meta.get(SPEC) for value in results), None if None in layouts else layouts


def state_spec(program: Program, target: str, prefixes: list[str]) -> TensorSpec | None:
    """The type of a parameter, buffer or constant, by its name relative to any of the prefixes; None if unknown."""
    owner, _, name = target.partition(".")
    if owner == CONSTANT and name in program.constants:
        tensor = program.constants[name]
        return TensorSpec(tuple(tensor.shape), tensor.dtype)
    if target in program.stored:
        return held_spec(program.stored[target])
    return next((program.state.get(qualified(prefix, target)) for prefix in prefixes), None)


def is_usual_layout(node: fx.Node, mesh: Mesh | None) -> bool:
    """Whether a parameter is whole on every rank, or on no mesh."""
    layout: Layout | None = node.meta.get(LAYOUT)
    return layout is None if mesh is None else layout is not None and layout.is_whole


def clauses(node: fx.Node, *, origin: bool = True) -> str:
    """What else is known of a node: where it comes from, its stage, whether it runs once a step, why it is whole."""
    text = ""
    where = where_of(node)
    if origin and where != Where():
        text += " at" + (f" {name_text(where.module)}" if where.module else "")
        text += f" {where.source!r}" if where.source else " ''"
    text += f" stage {node.meta[STAGE]}" if STAGE in node.meta else ""
    text += f" {scope_of(node).value}" if SCOPE in node.meta else ""
    return text + (f" fallback {node.meta[FALLBACK]!r}" if node.meta.get(FALLBACK) else "")

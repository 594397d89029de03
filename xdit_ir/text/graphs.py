"""Reads the lines of one graph."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from xdit_ir.errors import ParseError
from xdit_ir.ir.graphs import weights_of
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import (
    CONSTANT,
    LAYOUT,
    SCOPE,
    SPEC,
    STAGE,
    WEIGHT,
    WHERE,
    ComputeScope,
    Program,
    Where,
    call_block,
    qualified,
)
from xdit_ir.sharding.layout_graph import FALLBACK
from xdit_ir.text.attachments import attached
from xdit_ir.text.literals import RECORD, STRING, read_literal, read_name
from xdit_ir.text.scanner import Scanner
from xdit_ir.text.targets import is_target, resolve
from xdit_ir.text.types import TypeReader
from xdit_ir.text.write import result_types, state_spec, usual_name

CALL = r"([\w.$-]+)<([^>]*)>\("
OPERATOR = r"[A-Za-z_][\w.]*(?:::[\w.]+)?"


@dataclass
class GraphReader:
    """Reads one graph of a program whose weights, constants and blocks are known; `prefixes` are those of its calls."""

    program: Program
    types: TypeReader
    attachments: Mapping[str, Any]
    prefixes: Sequence[str] = ("",)
    single: bool = False
    is_body: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, fx.Node] = field(default_factory=dict)
    references: dict[str, fx.Node] = field(default_factory=dict)

    def read(self, lines: Sequence[Scanner]) -> fx.Graph:
        """The graph; its last line is its `return`."""
        for scanner in lines:
            with scanner.reading():
                returns = self._line(scanner)
                scanner.end()
            if returns:
                return self.graph
        where = f"line {lines[-1].line}: " if lines else ""
        raise ParseError(f"{where}expected a graph that ends with `return`")

    def _line(self, scanner: Scanner) -> bool:
        """One line; whether it is the last one."""
        if scanner.match(r"input\b"):
            self.input(scanner)
        elif scanner.match(r"return\b"):
            self._return(scanner)
            return True
        else:
            self._node(scanner)
        return False

    def input(self, scanner: Scanner) -> None:
        """One `%name: type`."""
        name, meta = self._typed(scanner)
        self._add(scanner, "placeholder", name, (), {}, name, meta | self._clauses(scanner))

    def parameters(self, scanner: Scanner) -> None:
        """The inputs of a block, up to the closing parenthesis."""
        while not scanner.take(")"):
            self.input(scanner)
            if not scanner.take(","):
                scanner.need(")")
                break

    def _typed(self, scanner: Scanner) -> tuple[str, dict[str, Any]]:
        scanner.need("%")
        name = scanner.expect(r"\w+", "the name of a value")
        if not scanner.take(":"):
            return name, {}
        spec, layout = self.types(scanner)
        return name, {SPEC: spec} if layout is None else {SPEC: spec, LAYOUT: layout}

    def _add(
        self, scanner: Scanner, op: str, target: Any, args: Any, kwargs: Any, name: str, meta: dict[str, Any]
    ) -> fx.Node:
        if name in self.values:
            raise ParseError(f"line {scanner.line}: there is a value %{name} already")
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise ParseError(f"line {scanner.line}: %{name} cannot be the name of a value; %{node.name} could")
        node.meta = meta
        self.values[name] = node
        return node

    def _return(self, scanner: Scanner) -> None:
        values = []
        while scanner.looking_at("[%@]"):
            values.append(self._reference(scanner))
            scanner.take(",")
        output = self.graph.output(values[0] if self.single else tuple(values))
        output.meta = self._clauses(scanner)
        output.meta[SPEC] = tuple(value.meta.get(SPEC) for value in values)

    def _node(self, scanner: Scanner) -> None:
        name, meta = self._typed(scanner)
        scanner.need("=")
        if scanner.take("@"):
            self._attribute(scanner, name, meta)
        elif scanner.take("%"):
            source = self._value(scanner)
            scanner.need("[")
            args = (source, int(scanner.expect(r"\d+", "the place of a result")))
            scanner.need("]")
            self._add(scanner, "call_function", operator.getitem, args, {}, name, meta | self._clauses(scanner))
        elif scanner.looking_at(CALL):
            self._call(scanner, name, meta)
        else:
            target = self._target(scanner)
            args, kwargs = self._arguments(scanner)
            self._add(scanner, "call_function", target, args, kwargs, name, meta | self._clauses(scanner))

    def _target(self, scanner: Scanner) -> Any:
        if scanner.take("$"):
            found = attached(self.attachments, scanner.expect(r"[\w.:\-]+", "an attachment"), scanner.line)
        elif scanner.looking_at(RECORD):
            found = read_literal(scanner, self.attachments, self._reference)
        else:
            found = resolve(scanner.expect(OPERATOR, "an operator, such as add.Tensor"), scanner.line)
        if not is_target(found):
            scanner.fail(f"an operator, and {found!r:.60} is none")
        scanner.need("(")
        return found

    def _arguments(self, scanner: Scanner) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = [], {}
        while not scanner.take(")"):
            key = scanner.match(r"[\w.]*[A-Za-z_][\w.]*(?==)")
            if key:
                scanner.need("=")
            value = read_literal(scanner, self.attachments, self._reference)
            if key:
                kwargs[key] = value
            else:
                args.append(value)
            if not scanner.take(","):
                scanner.need(")")
                break
        return tuple(args), kwargs

    def _call(self, scanner: Scanner, name: str, meta: dict[str, Any]) -> None:
        block = scanner.expect(r"[\w.$-]+", "a block")
        prefix = scanner.expect(r"<[^>]*>", "<the prefix of its parameters>")[1:-1]
        scanner.need("(")
        values, given = self._arguments(scanner)
        if block not in self.program.blocks:
            raise ParseError(f"line {scanner.line}: block {block} is called before it is defined")
        needed = weights_of(self.program.blocks[block].graph)
        if unknown := [key for key in given if key not in needed]:
            raise ParseError(f"line {scanner.line}: {block} has no weight {unknown[0]!r}; it has {', '.join(needed)}")
        weights = {key: given[key] if key in given else self._state(scanner, qualified(prefix, key)) for key in needed}
        if SPEC not in meta:
            spec, layout = result_types(self.program.blocks[block].graph)
            meta |= {SPEC: spec} if layout is None else {SPEC: spec, LAYOUT: layout}
        args = (block, prefix, list(values), weights)
        self._add(scanner, "call_function", call_block, args, {}, name, meta | self._clauses(scanner))

    def _attribute(self, scanner: Scanner, name: str, meta: dict[str, Any]) -> None:
        target = read_name(scanner)
        if SPEC not in meta:
            meta |= self._usual_meta(scanner, target)
        self.references.setdefault(target, self._weight(scanner, target, name, meta | self._clauses(scanner)))

    def _weight(self, scanner: Scanner, target: str, name: str, meta: dict[str, Any]) -> fx.Node:
        """What stands for a weight: in the body of a block an argument."""
        if not self.is_body or target.startswith(f"{CONSTANT}."):
            return self._add(scanner, "get_attr", target, (), {}, name, meta)
        return self._add(scanner, "placeholder", name, (), {}, name, meta | {WEIGHT: target})

    def _usual_meta(self, scanner: Scanner, target: str) -> dict[str, Any]:
        spec = state_spec(self.program, target, list(self.prefixes))
        if spec is None:
            raise ParseError(f"line {scanner.line}: @{target} is no weight or constant of the program, or has no type")
        return {SPEC: spec} if self.types.mesh is None else {SPEC: spec, LAYOUT: Layout.whole(len(spec.shape))}

    def _reference(self, scanner: Scanner) -> fx.Node:
        if scanner.take("%"):
            return self._value(scanner)
        scanner.need("@")
        return self._state(scanner, read_name(scanner))

    def _state(self, scanner: Scanner, target: str) -> fx.Node:
        if target not in self.references:
            meta = self._usual_meta(scanner, target)
            self.references[target] = self._weight(scanner, target, usual_name(target), meta)
        return self.references[target]

    def _value(self, scanner: Scanner) -> fx.Node:
        name = scanner.expect(r"\w+", "the name of a value")
        if name not in self.values:
            scanner.at -= len(name)
            scanner.fail("a value that stands before this line", self.values)
        return self.values[name]

    def _clauses(self, scanner: Scanner) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        if scanner.match(r"at\b"):
            meta[WHERE] = _where(scanner)
        if scanner.match(r"stage\b"):
            meta[STAGE] = int(scanner.expect(r"\d+", "a stage"))
        if scanner.match(r"once\b"):
            shared = scanner.match(r"shared\b") is not None
            meta[SCOPE] = ComputeScope.SHARED if shared else ComputeScope.FIRST_PATCH
        if scanner.match(r"fallback\b"):
            meta[FALLBACK] = ast.literal_eval(scanner.expect(STRING, "a reason in quotes"))
        return meta


def _where(scanner: Scanner) -> Where:
    first = None if scanner.looking_at(STRING) else read_name(scanner)
    strings = [] if first is None else [first]
    while len(strings) < 2 and (text := scanner.match(STRING)) is not None:
        strings.append(ast.literal_eval(text))
    return Where(*strings) if len(strings) == 2 else Where(source=strings[0])

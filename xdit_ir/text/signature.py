"""The signature of a program as text: how arguments become inputs, results outputs, and what was burned in.

A tree of arguments is written as Python writes it, with `*` for leaves; a container that PyTorch's pytree knows and
Python's syntax does not is written as pytree's JSON.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.ir.effects import Effect, Literal, PathEntry
from xdit_ir.ir.guards import Guard, Predicate
from xdit_ir.ir.program import InputLeaf, Signature
from xdit_ir.text.literals import STRING, LiteralWriter, name_text, read_literal, read_name, read_value
from xdit_ir.text.scanner import Scanner
from xdit_ir.text.trees import load_tree
from xdit_ir.text.types import TypeReader, TypeWriter

GraphLines = Callable[[fx.Graph], list[str]]
Lines = list[Scanner]
ReadGraph = Callable[[Lines, Mapping[str, Any]], fx.Graph]


def no_signature() -> Signature:
    """That of a program whose text says nothing of arguments and results."""
    empty = pytree.tree_structure(())
    return Signature(empty, (), empty, ())


def write_signature(signature: Signature, literal: LiteralWriter, graph: GraphLines) -> Iterator[str]:
    """Its lines."""
    types = TypeWriter(None)
    yield f"  arguments {_tree_text(signature.in_spec, literal)}"
    for leaf in signature.leaves:
        yield f"  leaf {leaf.path!r}" + (f": {types(leaf.spec, None)}" if leaf.spec is not None else "")
    yield f"  results {_tree_text(signature.out_spec, literal)}"
    yield f"  results are [{', '.join(_leaf_text(leaf, literal) for leaf in signature.out_leaves)}]"
    for guard in signature.guards:
        yield f"  guard {guard.path!r} = {literal(guard.value)} because {guard.reason!r}"
    for effect in signature.effects:
        yield f"  {_effect_text(effect, literal)}"
    for fact in signature.predicates:
        yield f"  predicate of {list(fact.paths)} = {literal(fact.value)} because {fact.reason!r} {{"
        yield from (f"    constant {name_text(name)} = {literal(held)}" for name, held in fact.constants.items())
        yield from (f"  {line}" for line in graph(fact.graph))
        yield "  }"


def _leaf_text(leaf: int | Literal, literal: LiteralWriter) -> str:
    return f"value {literal(leaf.value)}" if isinstance(leaf, Literal) else str(leaf)


def _effect_text(effect: Effect, literal: LiteralWriter) -> str:
    path = "".join(f".{name_text(str(e.key))}" if e.attribute else f"[{literal(e.key)}]" for e in effect.path)
    leaves = f"[{', '.join(_leaf_text(leaf, literal) for leaf in effect.leaves)}]"
    if effect.spec is None and not effect.write:
        return f"remove {path}"
    return f"{'write' if effect.write else 'set'} {path} to {leaves}" + (
        "" if effect.spec is None else f" as {_tree_text(effect.spec, literal)}"
    )


class _Leaf:
    """Stands for a leaf."""


def _tree_text(spec: pytree.TreeSpec, literal: LiteralWriter) -> str:
    stars = pytree.tree_unflatten([_Leaf() for _ in range(spec.num_leaves)], spec)
    text = LiteralWriter(literal.collected, lambda item: "*" if isinstance(item, _Leaf) else None)
    before = len(literal.collected.found)
    plain = text(stars)
    if len(literal.collected.found) == before and pytree.tree_structure(_read_tree(Scanner(plain))) == spec:
        return plain
    return f"pytree {pytree.treespec_dumps(spec)!r}"


def _read_tree(scanner: Scanner) -> Any:
    if scanner.take("*"):
        return _Leaf()
    if scanner.match(r"None\b"):
        return None
    for start, close, make in (("(", ")", tuple), ("[", "]", list), ("{", "}", dict)):
        if scanner.take(start):
            entries = []
            while not scanner.take(close):
                entries.append(_read_entry(scanner) if make is dict else _read_tree(scanner))
                scanner.take(",")
            return make(entries)
    scanner.fail("a tree of *, (), [], {}")


def _read_entry(scanner: Scanner) -> tuple[Any, Any]:
    key = read_literal(scanner, {}, lambda inner: inner.fail("a key"))
    scanner.need(":")
    return key, _read_tree(scanner)


def _read_spec(scanner: Scanner) -> pytree.TreeSpec:
    if scanner.match(r"pytree\b"):
        return load_tree(ast.literal_eval(scanner.expect(STRING, "pytree's JSON in quotes")))
    return pytree.tree_structure(_read_tree(scanner))


class SignatureReader:
    """Reads the lines of a signature one after the other."""

    def __init__(self, attachments: Mapping[str, Any], read_graph: ReadGraph) -> None:
        self.attachments, self.read_graph = attachments, read_graph
        self.types = TypeReader(None, {})
        self.leaves: list[InputLeaf] = []
        self.guards: list[Guard] = []
        self.effects: list[Effect] = []
        self.predicates: list[Predicate] = []
        self.specs: dict[str, pytree.TreeSpec] = {}
        self.out_leaves: tuple[int | Literal, ...] = ()

    def read(self, lines: Lines) -> Signature:
        """The signature."""
        rest = iter(lines)
        for scanner in rest:
            if scanner.match(r"predicate of\b"):
                self._predicate(scanner, rest)
            else:
                self._line(scanner)
            scanner.end()
        for name in ("arguments", "results"):
            if name not in self.specs:
                lines[-1].fail(f"a line `{name}` in the signature")
        return Signature(
            self.specs["arguments"],
            tuple(self.leaves),
            self.specs["results"],
            self.out_leaves,
            tuple(self.guards),
            tuple(self.predicates),
            tuple(self.effects),
        )

    def _line(self, scanner: Scanner) -> None:
        if scanner.match(r"results are\b"):
            self.out_leaves = self._out_leaves(scanner)
            return
        words = ("arguments", "results", "leaf", "guard", "set", "write", "remove", "predicate")
        word = scanner.match(r"(?:arguments|results|leaf|guard|set|write|remove)\b")
        match (word or scanner.fail(f"one of {', '.join(words)}", words)).strip():
            case "arguments" | "results" as name:
                self.specs[name] = _read_spec(scanner)
            case "leaf":
                path = read_name(scanner)
                self.leaves.append(InputLeaf(path, self.types(scanner)[0] if scanner.take(":") else None))
            case "guard":
                path = read_name(scanner)
                scanner.need("=")
                self.guards.append(Guard(path, read_value(scanner, self.attachments), _reason(scanner)))
            case word:
                self._effect(scanner, str(word))

    def _out_leaves(self, scanner: Scanner) -> tuple[int | Literal, ...]:
        scanner.need("[")
        found: list[int | Literal] = []
        while not scanner.take("]"):
            literal = scanner.match(r"value\b")
            found.append(
                Literal(read_value(scanner, self.attachments)) if literal else int(scanner.expect(r"\d+", "an output"))
            )
            scanner.take(",")
        return tuple(found)

    def _effect(self, scanner: Scanner, word: str) -> None:
        path = []
        while not scanner.done and scanner.looking_at(r"[.\[]"):
            if scanner.take("."):
                path.append(PathEntry(scanner.expect(r"\w+", "an attribute"), attribute=True))
            else:
                scanner.need("[")
                path.append(PathEntry(read_value(scanner, self.attachments)))
                scanner.need("]")
        if word == "remove":
            self.effects.append(Effect(tuple(path)))
            return
        scanner.need("to")
        leaves = self._out_leaves(scanner)
        spec = _read_spec(scanner) if scanner.match(r"as\b") else None
        self.effects.append(Effect(tuple(path), leaves, spec, word == "write"))

    def _predicate(self, scanner: Scanner, rest: Iterator[Scanner]) -> None:
        paths = tuple(read_value(scanner, self.attachments))
        scanner.need("=")
        value: torch.Tensor = read_value(scanner, self.attachments)
        reason = _reason(scanner)
        scanner.need("{")
        constants: dict[str, torch.Tensor] = {}
        body: Lines = []
        for line in rest:
            if line.take("}"):
                break
            if line.match(r"constant\b"):
                name = read_name(line)
                line.need("=")
                constants[name] = read_value(line, self.attachments)
            else:
                body.append(line)
        self.predicates.append(Predicate(self.read_graph(body, constants), paths, constants, value, reason))


def _reason(scanner: Scanner) -> str:
    scanner.need("because")
    return str(ast.literal_eval(scanner.expect(STRING, "a reason in quotes")))

"""Reads the complete text of a program."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from xdit_ir.errors import ParallelizeError, ParseError
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.ir.program import Block, Program, Seeding, Stored, TokenAxis
from xdit_ir.text.graphs import GraphReader
from xdit_ir.text.literals import read_name, read_value
from xdit_ir.text.scanner import Scanner
from xdit_ir.text.sections import TextSection, sections_of
from xdit_ir.text.signature import SignatureReader, no_signature
from xdit_ir.text.types import TypeReader, read_partition
from xdit_ir.text.write import usual_facts

LARGEST_MESH = 1 << 14  # ranks; a layout lists what each of them holds
CALLS = re.compile(r"= ([\w.$-]+)<([^>]*)>\(")


def parse(text: str, attachments: Mapping[str, Any] | None = None) -> Program:
    """The program that `xdit_ir.text.write` made this text from; lines that begin with `//` are comments.

    Args:
        text: a complete text: one `program`, its `block`s, and what follows them.
        attachments: what the text refers to by hash or name: `Document.attachments`.

    Raises:
        ParseError: names the line, what was expected there and what was found.
    """
    try:
        return _Reader(sections_of(text), attachments or {}).program()
    except ParseError:
        raise
    except Exception as error:
        raise ParseError(f"the text is no program: {type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, sections: Sequence[TextSection], attachments: Mapping[str, Any]) -> None:
        self.sections, self.attachments = sections, attachments
        programs = self._all("program")
        if len(programs) != 1:
            raise ParseError(f"expected one program in the text, got {len(programs)}")
        self.main = programs[0]
        name = self.main.head.expect(r"[\w.]+", "the program's name")
        mesh, self.partitions = self._program_mesh(), self._partitions()
        self.result = Program(name, fx.Graph(), {}, no_signature(), {}, torch.device("cpu"), mesh=mesh)
        self._change(facts=self._facts())
        self.types = TypeReader(self.result.layout_mesh, self.partitions)

    def _all(self, keyword: str) -> list[TextSection]:
        return [section for section in self.sections if section.keyword == keyword]

    def _lines(self, keyword: str) -> list[Scanner]:
        return [line for section in self._all(keyword) for line in section.lines]

    def program(self) -> Program:
        """All sections in the order in which they need each other."""
        self._change(
            state=self._weights(),
            stored=self._stored(),
            constants=self._tensors("constants"),
            contents=self._tensors("contents"),
            device=self._device(),
            tokens=self._tokens(),
        )
        self._change(coordinates=self._coordinates(), seeding=self._seeding())
        signature = self._lines("signature")
        if signature:
            self._change(signature=SignatureReader(self.attachments, self._predicate).read(signature))
        self._check_calls()
        self._change(blocks={block.name: block for block in map(self._block, self._all("block"))})
        graph = GraphReader(self.result, self.types, self.attachments).read(self.main.lines)
        return self.result.replace(graph=graph)

    def _check_calls(self) -> None:
        known = [section.head.text.split()[1].partition("(")[0] for section in self._all("block")]
        for line in self.main.lines:
            call = CALLS.search(line.text)
            if call is not None and call[1] not in known:
                raise ParseError(
                    f"line {line.line}: there is no block {call[1]}; there are {', '.join(known) or 'none'}"
                )

    def _change(self, **fields: Any) -> None:
        self.result = replace(self.result, **fields)

    def _program_mesh(self) -> Mesh | None:
        if self.main.head.match(r"on\b"):
            return self._mesh(self.main.head)
        self.main.head.end()
        return None

    def _mesh(self, head: Scanner) -> Mesh:
        if head.match(r"1 rank"):
            return Mesh()
        names, sizes = list[str](), list[int]()
        while not head.done:
            names.append(head.expect(r"\w+(?==)", f"a mesh dim such as {' or '.join(MESH_DIMS)} with its size"))
            head.need("=")
            sizes.append(int(head.expect(r"\d+", "a size")))
        if math.prod(sizes) > LARGEST_MESH:
            raise ParseError(f"line {head.line}: a mesh of {math.prod(sizes)} ranks; expected {LARGEST_MESH} at most")
        try:
            return Mesh(tuple(names), tuple(sizes))
        except ParallelizeError as error:
            raise ParseError(f"line {head.line}: {error}") from None

    def _partitions(self) -> dict[int, Any]:
        found = {}
        for line in self._lines("partitions"):
            number = int(line.expect(r"#\d+", "the number of a partition, such as #0")[1:])
            line.need(":")
            found[number] = read_partition(line)
            line.end()
        return found

    def _facts(self) -> frozenset[Fact]:
        for section in self._all("facts"):
            found = set[Fact]()
            while not section.head.done:
                word = next((fact for fact in Fact if section.head.match(rf"{fact.value}\b")), None)
                found.add(word or section.head.fail("a fact", [fact.value for fact in Fact]))
                section.head.take(",")
            return frozenset(found)
        return usual_facts(self.result.mesh)

    def _seeding(self) -> Seeding | None:
        for section in self._all("seeds"):
            section.head.need("on")
            mesh, seeds = self._mesh(section.head), dict[str, tuple[Layout, ...]]()
            types = TypeReader(mesh, self.partitions)
            for line in section.lines:
                name = line.expect(r"%\w+", "a value")[1:]
                line.need(":")
                layouts = [types(line)[1]]
                while line.take(","):
                    layouts.append(types(line)[1])
                line.end()
                seeds[name] = tuple(layouts)
            return Seeding(mesh, seeds)
        return None

    def _device(self) -> torch.device:
        for section in self._all("device"):
            found = read_value(section.head, self.attachments)
            return found if isinstance(found, torch.device) else section.head.fail("a device")
        return torch.device("cpu")

    def _coordinates(self) -> tuple[int, ...]:
        for section in self._all("coordinates"):
            found = read_value(section.head, self.attachments)
            return found if isinstance(found, tuple) else section.head.fail("the coordinates of stages, such as (0, 1)")
        return ()

    def _weights(self) -> dict[str, Any]:
        types, found = TypeReader(None, {}), {}
        for line in self._lines("weights"):
            name = read_name(line)
            line.need(":")
            found[name], _ = types(line)
            line.end()
        return found

    def _stored(self) -> dict[str, Stored]:
        types, found = TypeReader(None, {}), dict[str, Stored]()
        for line in self._lines("stored"):
            name = read_name(line)
            line.need(":")
            spec, _ = types(line)
            line.need("=")
            members = read_value(line, self.attachments)
            on_host = bool(line.match(r"on host\b"))
            held = read_value(line, self.attachments) if line.match(r"held\b") else None
            line.end()
            found[name] = Stored(spec, tuple(members.items()), held, on_host)
        return found

    def _tensors(self, section: str) -> dict[str, torch.Tensor]:
        found = {}
        for line in self._lines(section):
            name = read_name(line)
            line.need("=")
            found[name] = read_value(line, self.attachments)
            line.end()
        return found

    def _tokens(self) -> tuple[TokenAxis, ...]:
        return tuple(self._token(line) for line in self._lines("tokens"))

    def _token(self, line: Scanner) -> TokenAxis:
        value = line.expect(r"%\w+", "a value")[1:]
        line.need("dim")
        dim = int(line.expect(r"\d+", "a dimension"))
        line.need("of")
        size = int(line.expect(r"\d+", "a size"))
        units = tuple(read_value(line, self.attachments)) if line.match(r"units\b") else ()
        segments = tuple(map(tuple, read_value(line, self.attachments))) if line.match(r"segments\b") else ()
        gathered = line.match(r"gathered\b") is not None
        line.end()
        return TokenAxis(value, dim, size, units, segments, gathered)

    def _block(self, section: TextSection) -> Block:
        name = section.head.expect(r"[\w.$-]+", "the block's name")
        prefixes = [call[2] for line in self.main.lines for call in CALLS.finditer(line.text) if call[1] == name]
        reader = GraphReader(self.result, self.types, self.attachments, prefixes, is_body=True)
        section.head.need("(")
        reader.parameters(section.head)
        section.head.end()
        return Block(name, reader.read(section.lines))

    def _predicate(self, lines: Sequence[Scanner], constants: Mapping[str, Any]) -> fx.Graph:
        reader = GraphReader(self.result, TypeReader(None, {}), self.attachments, (), single=True)
        return reader.read(lines)

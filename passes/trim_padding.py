"""`trim-padding`: rows at the end of an input that masks make idle are not computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs, placeholders
from xdit_ir.ir.program import LAYOUT, SPEC, Program
from xdit_ir.passes.idle_keys import NotIdle, idle_places
from xdit_ir.passes.input_cones import InputCones
from xdit_ir.passes.live_rows import idle_part, kept_program, without_rows
from xdit_ir.rules import rule_for

aten = torch.ops.aten
ROWS = 64


def rows_to_trim(option: bool | int) -> int:
    """The multiple of rows that `trim_padding` means; 0: nothing is trimmed.

    Raises:
        ParallelizeError: it is neither True or False nor a positive integer.
    """
    if isinstance(option, bool):
        return ROWS * option
    if not isinstance(option, int) or option < 1:
        raise ParallelizeError(
            f"trim_padding={option!r}: expected True, False or a positive number of rows; nearest legal: {ROWS}"
        )
    return option


@dataclass(frozen=True)
class TrimPadding:
    """Text that is padded to a length is cut, right behind the inputs, to the longest prompt of the batch, rounded up
    to a multiple of rows, where nothing that is returned depends on the rest.

    That is asked of the rules: the rows are given to a rank of their own, and no other may need anything of it but keys
    that masks hide (by False, or a number that leaves nothing of them) and summands that masks make zero. The masks
    must follow from inputs alone; what they say of the rows becomes a predicate, so that a prompt of another length in
    these multiples is traced anew. An input of which this cannot be shown stays as it is.
    """

    name: ClassVar[str] = "trim-padding"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})

    multiple: int = ROWS

    def apply(self, program: Program) -> Program:
        """The program without such rows; its signature says how many there may be."""
        if any(is_random(node.target) for _, graph, _ in all_graphs(program) for node in graph.nodes):
            return program  # fewer numbers would be drawn, so that others are
        done: set[str] = set()
        for name, dim in list(_candidates(program, self.multiple)):
            if name not in done:
                program, met = _Trim(program, name, dim, self.multiple).made()
                done |= met
        return program


def _candidates(program: Program, multiple: int) -> Iterator[tuple[str, int]]:
    """Dims of inputs that may be rows, streams first: of floating-point inputs the last dim is features."""
    specs = {node.name: node.meta[SPEC] for node in placeholders(program.graph)}
    for name, spec in sorted(specs.items(), key=lambda item: (not item[1].dtype.is_floating_point, -item[1].nbytes)):
        last = len(spec.shape) - int(spec.dtype.is_floating_point)
        yield from ((name, dim) for dim in range(last) if spec.shape[dim] > multiple)


class _Trim:
    """One dim of one input."""

    def __init__(self, program: Program, name: str, dim: int, multiple: int) -> None:
        self.program, self.name, self.dim, self.multiple = program, name, dim, multiple
        self.node = next(node for node in program.graph.nodes if node.name == name)
        self.size: int = self.node.meta[SPEC].shape[dim]
        self.cones = InputCones(program)

    def made(self) -> tuple[Program, set[str]]:
        """The program without idle rows, or the same, and the inputs that have rows which go with these."""
        least = without_rows(self.program, self.name, self.dim, self.multiple)
        met = {node.name for node in placeholders(least.graph) if _is_cut(node)}
        try:
            each = self._each(least, self.multiple)
            kept = self._kept(each)
            if kept == self.size:
                return self._guarded(self.program, [], each, kept), met
            divided = least if kept == self.multiple else without_rows(self.program, self.name, self.dim, kept)
            found = self._each(divided, kept)
            made = self._guarded(kept_program(self.program, divided), [found], each, kept)
        except NotIdle:
            return self.program, met
        return (made if _is_known(made, self.program) else self.program), met

    def _each(self, divided: Program, kept: int) -> fx.Node:
        """For each row behind those that are kept whether it is idle.

        Raises:
            NotIdle: nothing says so, or not row by row.
        """
        each = [one.each(self.cones) for one in idle_places(self.program, divided, self.cones)]
        if not each or any(one.meta[SPEC].shape != (self.size - kept,) for one in each):
            raise NotIdle(f"{self.name}: no mask is about its rows")
        result = each[0]
        for one in each[1:]:
            result = self.cones.add(aten.logical_and.default, result, one)
        return result

    def _kept(self, each: fx.Node) -> int:
        """How many rows to keep for the inputs of the trace."""
        idle = self.cones.contents(each)
        if not idle.any() and not any(self._hides(each, real) for real in (True, False)):
            raise NotIdle(f"{self.name}: its mask leaves something of what it hides")
        busy = (~idle).nonzero()
        real = self.multiple + int(busy[-1]) + 1 if len(busy) else 0
        return min(-(-max(real, 1) // self.multiple) * self.multiple, self.size)

    def _hides(self, each: fx.Node, real: bool) -> bool:
        """Whether rows would be idle if masks said `real` of the first ones and the opposite of the others."""
        inputs = {path: torch.full_like(x, real) for path, x in self.cones.inputs.items()}
        for x in inputs.values():
            for dim in (dim for dim, size in enumerate(x.shape) if size == self.size):
                x.narrow(dim, self.multiple, self.size - self.multiple).fill_(not real)
        return bool(self.cones.contents(each, inputs).all())

    def _guarded(self, made: Program, idle: list[fx.Node], each: fx.Node, kept: int) -> Program:
        """The program for inputs whose rows are idle from `kept` on, and not from a multiple of rows before."""
        asked = [self.cones.add(aten.all.default, one) for one in idle]
        if kept > self.multiple:
            first = (kept - 1) // self.multiple * self.multiple
            before = self.cones.add(aten.slice.Tensor, each, 0, first - self.multiple, kept - self.multiple)
            asked.append(self.cones.add(aten.all.default, before))
        answer = self.cones.add(aten.stack.default, asked)
        value = self.cones.contents(answer)
        if idle and not value[0]:
            raise NotIdle(f"{self.name}: its rows are not idle")
        paths = [leaf.path for leaf in self.program.signature.leaves if leaf.spec is not None]
        path = paths[placeholders(self.program.graph).index(self.node)]
        rows = f"{path}[{':, ' * self.dim}{kept}:]"
        said = f"{rows} is padding, which is not computed" if idle else f"there is little padding in {path}"
        fact = self.cones.predicate(answer, value, said)
        signature = made.signature
        return made.replace(signature=replace(signature, predicates=(*signature.predicates, fact)))


def _is_cut(node: fx.Node) -> bool:
    """Whether rows of an input are left out wherever it is used."""
    cuts = [user.meta[LAYOUT].dims for user in node.users if user.target is ops.shard]
    return len(cuts) == len(node.users) > 0 and all(any(idle_part(one).size for one in dims) for dims in cuts)


def _is_known(made: Program, program: Program) -> bool:
    """Whether rules say of every operator how it is divided further, as far as they did before."""
    before = {node.target for _, graph, _ in all_graphs(program) for node in graph.nodes}
    new = {node.target for _, graph, _ in all_graphs(made) for node in graph.nodes if node.op == "call_function"}
    return all(rule_for(target) is not None for target in new - before)

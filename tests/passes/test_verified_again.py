"""What is verified after every pass, and tried for every shape, is looked at once: and all that is new is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.errors import VerifyError
from xdit_ir.ir.graphs import all_graphs, map_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import LAYOUT, Program
from xdit_ir.passes import find_tokens
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.order import mesh_passes
from xdit_ir.sharding import verify

aten = torch.ops.aten
MESH = Mesh.of(ulysses=2)


@dataclass(frozen=True)
class Rewrite:
    """A pass that does something to the operators that take or give something divided."""

    name: ClassVar[str] = "rewrite"

    change: Callable[[fx.Node], bool]

    def apply(self, program: Program) -> Program:
        """The program with the first that `change` can change."""
        done: list[bool] = []

        def rewrite(graph: fx.Graph) -> None:
            for node in graph.nodes:
                if not done and node.op == "call_function" and self.change(node):
                    done.append(True)

        found = map_graphs(program, rewrite)
        assert done or self.change is nothing
        return found


def nothing(node: fx.Node) -> bool:
    return False


def other_argument(node: fx.Node) -> bool:
    """A view that takes its dims in another order."""
    if node.target is not aten.permute.default or node.meta[LAYOUT].is_whole:
        return False
    node.args = (node.args[0], list(range(len(node.args[1]))))  # type: ignore[arg-type]
    return True


def other_layout(node: fx.Node) -> bool:
    """A product that is said to be whole on every rank."""
    if node.target is not aten.linear.default or node.meta[LAYOUT].is_whole:
        return False
    node.meta[LAYOUT] = type(node.meta[LAYOUT]).whole(len(node.meta[LAYOUT].dims))
    return True


@pytest.fixture(scope="module")
def analysed() -> Program:
    return xir.trace(*models.load("plain-mmdit:tiny")).analysed


@pytest.mark.parametrize("change", [other_argument, other_layout])
def test_a_call_that_was_right_and_is_changed_is_found(analysed: Program, change: Callable[[fx.Node], bool]) -> None:
    passes: list[Any] = [*mesh_passes(MESH), Rewrite(nothing), Rewrite(change)]
    with pytest.raises(VerifyError, match="after rewrite"):
        run_passes(analysed, passes)


def test_a_call_is_inferred_once_however_many_passes_leave_it(
    analysed: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = verify.infer, list[Any]()
    monkeypatch.setattr(verify, "infer", lambda call: calls.append(call) or real(call))
    run_passes(analysed, mesh_passes(MESH))
    before = len(calls)
    run_passes(analysed, [*mesh_passes(MESH), Rewrite(nothing), Rewrite(nothing)])
    assert len(calls) == 2 * before > 0


@pytest.mark.parametrize("size, tries", [((26, 44), 1), ((2, 2), 1), ((1, 1), None)])
def test_streams_of_a_program_that_differs_in_sizes_are_not_searched_anew(
    size: tuple[int, int], tries: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the best, which is tried; nor where a dimension is too short now, so that another may be a stream."""
    model, example = models.load("plain-mmdit:tiny")
    known = find_tokens.Streams.of(xir.trace(model, example).analysed)
    x, text = torch.randn(2, 4, *(2 * one for one in size)), torch.randn(2, 31, 32)
    further = xir.trace(model, {**example, "x": x, "text": text}).ir
    real, tried = find_tokens._probed, list[Any]()
    monkeypatch.setattr(find_tokens, "_probed", lambda *args: tried.append(args) or real(*args))
    want = TracedProgram(further).analysed.tokens
    anew = len(tried)
    tried.clear()
    assert TracedProgram(further, streams=known).analysed.tokens == want
    assert len(tried) == (anew if tries is None else tries)


def test_passes_edit_what_they_have_made_and_nothing_else(analysed: Program) -> None:
    """Whether somebody looks at every program in between or not, the last one is the same."""
    before, seen = program_text(analysed, bodies=True), list[Program]()
    edited = run_passes(analysed, mesh_passes(MESH))
    assert program_text(analysed, bodies=True) == before and not edited.spare
    watched = run_passes(analysed, mesh_passes(MESH), lambda _, program: seen.append(program))
    texts = [program_text(program, bodies=True) for program in seen]
    assert program_text(watched, bodies=True) == program_text(edited, bodies=True) == texts[-1]
    assert not any(program.spare for program in seen)
    graphs = [{id(graph) for _, graph, _ in all_graphs(program)} for program in (analysed, edited)]
    assert graphs[0].isdisjoint(graphs[1])

"""What a pass is, and how a list of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from torch import fx

from xdit_ir.program import Program
from xdit_ir.verify import verify


class Pass(Protocol):
    """A frozen dataclass with options; `apply` returns a new program and leaves its input as it was."""

    @property
    def name(self) -> str:
        """The pass's name as users see it."""
        ...

    def apply(self, program: Program) -> Program:
        """The rewritten program."""
        ...


def run_passes(
    program: Program, passes: Sequence[Pass], after: Callable[[Pass, Program], None] | None = None
) -> Program:
    """Apply passes in order, verify after each; `after` sees every intermediate program."""
    for one in passes:
        program = one.apply(program)
        verify(program, one.name)
        if after is not None:
            after(one, program)
    return program


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy to edit; metadata dicts are copied, their values shared."""
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = result.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
    return result


def map_graphs(program: Program, rewrite: Callable[[fx.Graph], None]) -> Program:
    """Apply an in-place rewrite to copies of the outer graph and every block body."""
    outer = copy_graph(program.graph)
    rewrite(outer)
    blocks = {}
    for name, block in program.blocks.items():
        body = copy_graph(block.graph)
        rewrite(body)
        blocks[name] = replace(block, graph=body)
    return program.replace(graph=outer, blocks=blocks)


def remove_dead(graph: fx.Graph) -> None:
    """Erase what nothing uses; placeholders stay."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)

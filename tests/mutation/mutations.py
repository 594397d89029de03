"""Ways to break a parallel program: small changes of the divided program, of one rank's, or of a pipeline's parts.

A change edits one graph in place and returns the node that it broke, or None where it finds nothing to break.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from xdit_ir.api import ParallelProgram
from xdit_ir.ir import ops, window_ops
from xdit_ir.ir.buffer_ops import Keep, Read, Recall, Write
from xdit_ir.ir.collective_ops import Reduce, Reshuffle, Ring
from xdit_ir.ir.graphs import copy_graph
from xdit_ir.ir.partition import Indices, Partition, Runs
from xdit_ir.ir.program import LAYOUT, SPEC, Program, is_block_call
from xdit_ir.ir.relayout import Piece, RankExchange
from xdit_ir.pipefusion.pipeline_program import PatchStage

aten = torch.ops.aten
Change = Callable[[fx.Graph], "fx.Node | None"]


@dataclass(frozen=True)
class Broken:
    """A broken program, and the names of the node and of its direct consumers, in the body or outer graph."""

    program: ParallelProgram
    node: str
    near: frozenset[str]
    inside: bool


def break_program(parallel: ParallelProgram, change: Change) -> Broken:
    """Change the divided program, before it becomes the ranks' programs."""
    ir, broken = _broken(parallel.ir, change)
    return Broken(replace(parallel, ir=ir, _ranks={}), *broken)


def break_ranks(parallel: ParallelProgram, change: Change, ranks: Sequence[int]) -> Broken:
    """Change the programs of some ranks; the others keep theirs."""
    programs, broken = {}, None
    for rank in ranks:
        programs[rank], broken = _broken(parallel.rank(rank), change)
    assert broken is not None
    return Broken(replace(parallel, _ranks=programs), *broken)


def break_parts(parallel: ParallelProgram, change: Change, stage: int, virtual: int) -> Broken:
    """Change what a stage does for one patch."""
    assert parallel.pipeline is not None
    part = parallel.pipeline.part(stage, virtual)
    program, broken = _broken(part.program, change)
    parts: dict[tuple[int, int], PatchStage] = {(stage, virtual): replace(part, program=program)}
    return Broken(replace(parallel, pipeline=replace(parallel.pipeline, _parts=parts)), *broken)


def _broken(program: Program, change: Change) -> tuple[Program, tuple[str, frozenset[str], bool]]:
    """The program with the first body, else the outer graph, in which there is something to break."""
    for name, block in program.blocks.items():
        graph = copy_graph(block.graph)
        node = change(graph)
        if node is not None:
            blocks = {**program.blocks, name: replace(block, graph=graph)}
            return program.replace(blocks=blocks), (
                node.name,
                near(block.graph, node.name) | near(graph, node.name),
                True,
            )
    graph = copy_graph(program.graph)
    node = change(graph)
    assert node is not None, "there is nothing to break"
    return program.replace(graph=graph), (node.name, near(program.graph, node.name) | near(graph, node.name), False)


def near(graph: fx.Graph, name: str) -> frozenset[str]:
    """A node and its direct consumers, if it is there."""
    found = [node for node in graph.nodes if node.name == name]
    return frozenset({name} | {user.name for node in found for user in node.users})


def of(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Nodes by target, or by the class of their target."""
    for node in list(graph.nodes):
        if any(node.target is t or (isinstance(t, type) and isinstance(node.target, t)) for t in targets):
            yield node


def first(graph: fx.Graph, *targets: Any) -> fx.Node | None:
    return next(of(graph, *targets), None)


# Changes of any graph.
def dropped(*targets: Any) -> Change:
    """An operator is left out: its users get its operand."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, *targets):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            return node
        return None

    return change


def doubled(*targets: Any) -> Change:
    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, *targets):
            with graph.inserting_after(node):
                again = graph.call_function(node.target, (node,), {})
            again.meta = dict(node.meta)
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
            return node
        return None

    return change


def retargeted(target: Any, other: Any) -> Change:
    def change(graph: fx.Graph) -> fx.Node | None:
        node = first(graph, target)
        if node is not None:
            node.target, node.kwargs = other, {} if other is aten.silu.default else node.kwargs
        return node

    return change


def option(target: Any, **options: Any) -> Change:
    """Other keyword arguments."""

    def change(graph: fx.Graph) -> fx.Node | None:
        node = first(graph, target)
        if node is not None:
            node.kwargs = {**node.kwargs, **options}
        return node

    return change


def argument(target: Any, place: int, value: Any) -> Change:
    """Another constant at this place of the arguments."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, target):
            if len(node.args) > place and not isinstance(node.args[place], fx.Node) and node.args[place] != value:
                node.update_arg(place, value)
                return node
        return None

    return change


def swapped(target: Any, one: int, other: int) -> Change:
    """Two operands in the wrong order; the last such operator whose operands differ."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, target):
            args = list(node.args)
            if len(args) > max(one, other) and _alike(args[one], args[other]) and args[one] is not args[other]:
                args[one], args[other] = args[other], args[one]
                node.args = tuple(args)
                return node
        return None

    return change


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.meta.get(SPEC) == b.meta.get(SPEC)


def exchanged_pieces(graph: fx.Graph) -> fx.Node | None:
    """Two results of a split change places, such as shift and scale, or the two halves that a rotation turns."""
    for node in of(graph, aten.split.Tensor, aten.chunk.default, aten.unbind.int):
        picks = {user.args[1]: user for user in node.users}
        if {0, 1} <= set(picks):
            picks[0].update_arg(1, 1)
            picks[1].update_arg(1, 0)
            return picks[0]
    return None


def unmasked(graph: fx.Graph) -> fx.Node | None:
    for node in of(graph, ops.attention):
        if isinstance(node.kwargs.get("mask"), fx.Node):
            node.kwargs = {**node.kwargs, "mask": None}
            return node
        if len(node.args) > 3 and node.args[3] is not None:
            node.args = (*node.args[:3], None, *node.args[4:])
            return node
    return None


def no_residual(graph: fx.Graph) -> fx.Node | None:
    """What was added up is passed over once."""
    for node in of(graph, aten.add.Tensor):
        if all(isinstance(arg, fx.Node) for arg in node.args) and _alike(*node.args[:2]):
            node.update_arg(0, node.args[1])
            return node
    return None


def other_weights(graph: fx.Graph) -> fx.Node | None:
    """A block call with the parameters of the layer before."""
    calls = [node for node in graph.nodes if is_block_call(node)]
    for one, other in itertools.pairwise(calls):
        if one.args[0] == other.args[0]:
            other.update_arg(3, one.args[3])
            return other
    return None


def other_bias(graph: fx.Graph) -> fx.Node | None:
    """A layer reads the parameter of another one of the same size."""
    linear = [n for n in of(graph, aten.linear.default) if len(n.args) > 2 and isinstance(n.args[2], fx.Node)]
    for one, other in itertools.pairwise(linear):
        if _alike(one.args[2], other.args[2]) and one.args[2] is not other.args[2]:
            before = list(graph.nodes)
            if before.index(other.args[2]) < before.index(one):
                one.update_arg(2, other.args[2])
                return one
            other.update_arg(2, one.args[2])
            return other
    return None


# Changes of layouts.
def shifted_layout(target: Any) -> Change:
    """The boundary between the first two ranks' parts is off by one."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, target):
            layout = node.meta[LAYOUT]
            for dim, partition in enumerate(layout.dims):
                if partition is not None:
                    node.meta[LAYOUT] = layout.with_dims({dim: _shifted(partition)})
                    return node
        return None

    return change


def _shifted(partition: Partition) -> Partition:
    size, parts = partition.size, list(partition.parts)
    parts[0], parts[1] = Indices.range(0, parts[0].size + 1), Indices.range(parts[0].size + 1, size)
    return Partition(size, tuple(parts))


def undivided_output(graph: fx.Graph) -> fx.Node | None:
    """The output is not gathered."""
    [output] = (node for node in graph.nodes if node.op == "output")
    for value in list(output.all_input_nodes):
        if value.target is ops.gather:
            output.replace_input_with(value, value.args[0])
            return value
    return None


# Changes of a rank's program.
def moved(value: str, run: int = -1) -> Change:
    """A rank cuts its part of a value (one run of it) one place too early."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, ops.take):
            source, dim, runs = node.args
            if source.name == value:
                moved = [
                    (start - 1, size) if at == run % len(runs) else (start, size)
                    for at, (start, size) in enumerate(runs)
                ]
                node.args = (source, dim, tuple(moved))
                return node
        return None

    return change


def swapped_halves(graph: fx.Graph) -> fx.Node | None:
    """A rank takes the other half of the batch."""
    for node in of(graph, ops.take):
        _, dim, runs = node.args
        size = node.args[0].meta[SPEC].shape[dim]
        if dim == 0 and len(runs) == 1 and 2 * runs[0][1] == size and node.meta[SPEC].dtype.is_floating_point:
            node.args = (node.args[0], dim, ((size - runs[0][1] - runs[0][0], runs[0][1]),))
            return node
    return None


def reordered(graph: fx.Graph) -> fx.Node | None:
    """Two collectives in the other order."""
    found = list(of(graph, Reshuffle, Reduce))
    for one, other in itertools.pairwise(found):
        if one not in _ancestors(other):
            before = [n for n in graph.nodes if n is not one]
            later = [n for n in before[before.index(other) :] if one in _ancestors(n)]
            for node in [one, *[n for n in graph.nodes if one in _ancestors(n) and n not in later]][::-1]:
                other.append(node)
            graph.lint()
            return one
    return None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return seen


def exchange(rewrite: Callable[[RankExchange], RankExchange | None], kind: str = "") -> Change:
    """Another half of an exchange."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in of(graph, Reshuffle):
            found = rewrite(node.target.exchange) if kind in ("", node.target.kind) else None
            if found is not None:
                node.target = replace(node.target, exchange=found)
                return node
        return None

    return change


def wrong_receivers(x: RankExchange) -> RankExchange | None:
    """Pieces of equal size go to the wrong members."""
    sends = x.sends[1:] + x.sends[:1]
    return replace(x, sends=sends) if sends != x.sends and len({piece.shape for piece in sends}) == 1 else None


def wrong_places(x: RankExchange) -> RankExchange | None:
    """What arrived is put together in the wrong order."""
    places = x.places[1:] + x.places[:1]
    return replace(x, places=places) if places != x.places and len(set(x.shapes)) == 1 else None


def shifted_pieces(x: RankExchange) -> RankExchange | None:
    """Everybody gets heads (or tokens) that begin one place further: off by one, with the last one twice."""
    sends = []
    for piece in x.sends:
        take = list(piece.take)
        for dim, runs in enumerate(take):
            if runs is not None and len(runs) == 1 and runs[0][0] > 0:
                take[dim] = ((runs[0][0] - 1, runs[0][1]),)
        sends.append(Piece(tuple(take), piece.shape))
    return replace(x, sends=tuple(sends)) if tuple(sends) != x.sends else None


def wrong_group(graph: fx.Graph) -> fx.Node | None:
    """An exchange with the ranks of another mesh dim: of a 2x2 mesh, rank 0 talks to 2 instead of 1."""
    for node in of(graph, Reshuffle, Reduce):
        group = node.target.group
        if group == (0, 1):
            node.target = replace(node.target, group=(0, 2))
            return node
    return None


def unpadded(graph: fx.Graph) -> fx.Node | None:
    """The zero padding of a convolution on the wrong side."""
    for node in of(graph, window_ops.padded_conv):
        padding = [tuple(pair) for pair in node.args[4]]
        if any(a != b for a, b in padding):
            node.update_arg(4, [(b, a) for a, b in padding])
            return node
    return None


def wrong_keys(graph: fx.Graph) -> fx.Node | None:
    """A ring that reads the columns of the mask in another member's place."""
    for node in of(graph, Ring):
        node.target = replace(node.target, keys=(node.target.keys[0] - 1, node.target.keys[1] + 1))
        return node
    return None


def scaled_summand(graph: fx.Graph) -> fx.Node | None:
    """A rank's summand counts twice."""
    for node in of(graph, Reduce):
        with graph.inserting_before(node):
            twice = graph.call_function(aten.mul.Tensor, (node.args[0], 2.0))
        node.update_arg(0, twice)
        return node
    return None


# Changes of a pipeline's parts.
def first_rows(graph: fx.Graph) -> fx.Node | None:
    """Writes to the rows of the first patch."""
    for node in of(graph, Write):
        places = tuple(None if runs is None else _from_zero(runs) for runs in node.target.places)
        if places != node.target.places:
            node.target = replace(node.target, places=places)
            return node
    return None


def _from_zero(runs: Runs) -> Runs:
    return ((0, sum(length for _, length in runs)),)


def rotated_rows(graph: fx.Graph) -> fx.Node | None:
    """Reads the rows of the patches in another order."""
    for node in of(graph, Read):
        shape = node.meta[SPEC].shape
        dim = max(range(len(shape)), key=shape.__getitem__)
        if node.target.places[dim] is None:
            half = shape[dim] // 2
            places = list(node.target.places)
            places[dim] = ((half, shape[dim] - half), (0, half))
            node.target = replace(node.target, places=tuple(places))
            return node
    return None


def weights_of(prefix: str) -> Change:
    """A block call with the parameters of this layer."""

    def change(graph: fx.Graph) -> fx.Node | None:
        for node in graph.nodes:
            if is_block_call(node):
                node.update_arg(1, prefix)
                return node
        return None

    return change


def recalled_other(graph: fx.Graph) -> fx.Node | None:
    """Recalls another value of the same type."""
    found = list(of(graph, Recall))
    for one in found:
        for other in found:
            if _alike(one, other) and one is not other:
                one.target = replace(one.target, slot=other.target.slot)
                return one
    return None


def unpublished(graph: fx.Graph) -> fx.Node | None:
    return dropped(Write)(graph)


def not_kept(graph: fx.Graph) -> fx.Node | None:
    return dropped(Keep)(graph)


def mixed_message(parallel: ParallelProgram) -> Broken:
    """The last stage takes two entries of the message for each other."""
    assert parallel.pipeline is not None
    stage = parallel.pipeline.stages - 1
    part = parallel.pipeline.part(stage, 0)
    receives = (part.receives[1], part.receives[0], *part.receives[2:])
    parts = {(stage, 0): replace(part, receives=receives)}
    pipeline = replace(parallel.pipeline, _parts=parts)
    return Broken(replace(parallel, pipeline=pipeline), receives[0], frozenset(receives[:2]), False)

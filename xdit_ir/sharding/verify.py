"""The verifier, run after every pass: structure, types, and layouts re-inferred by the rules."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import fx

from xdit_ir.errors import VerifyError, XditError
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import arguments_of, operands, placeholders, results_of, weights_of
from xdit_ir.ir.layout import Layout, key_gather_dims
from xdit_ir.ir.mesh import RING, Mesh
from xdit_ir.ir.printer import target_name
from xdit_ir.ir.program import CONSTANT, LAYOUT, SPEC, Program, Stored, TensorSpec, call_parts, is_block_call
from xdit_ir.ir.relayout import kind
from xdit_ir.ir.stored import held_spec, member_at, problem, source_of
from xdit_ir.rules import infer
from xdit_ir.rules.base import OpCall, Outputs
from xdit_ir.rules.norms import divided_statistics

OUTER = "outer graph"


# What rules infer, by all that they look at: the same call after one pass and the next is inferred once.
Inferred = dict[Hashable, tuple[tuple[Layout, ...], Outputs]]


def verify(program: Program, after: str = "", *, runnable: bool = False, inferred: Inferred | None = None) -> None:
    """Raise `VerifyError` where the program breaks an invariant; `after` names the pass to blame.

    `runnable`: also every attention must find all keys on its rank, or pass them around along `ring` only, and every
    norm all that its statistics are taken of. `inferred`: that of programs before, which is added to.
    """
    where = f"after {after}" if after else "program"
    _Verifier(program, where, runnable, {} if inferred is None else inferred).check()


@dataclass(frozen=True, eq=False)
class _Called:
    """A block as its calls see it: what is given, all that it takes, with types and layouts, the names of its weights,
    and whether these come behind what is given; the layouts of its results."""

    inputs: list[fx.Node]
    taken: list[fx.Node]
    types: list[tuple[Any, Any]]
    needed: list[str]
    in_order: bool
    layouts: tuple[Layout | None, ...]

    @staticmethod
    def of(graph: fx.Graph) -> _Called:
        inputs, taken, weights = arguments_of(graph), placeholders(graph), weights_of(graph)
        layouts = tuple(result.meta.get(LAYOUT) for result in results_of(graph))
        in_order = taken == [*inputs, *weights.values()]
        return _Called(inputs, taken, list(map(_type, taken)), list(weights), in_order, layouts)


class _Verifier:
    def __init__(self, program: Program, where: str, runnable: bool, inferred: Inferred) -> None:
        self.program, self.where, self.runnable, self.inferred = program, where, runnable, inferred
        self.place = ""
        self._blocks: dict[str, _Called] = {}

    def check(self) -> None:
        try:
            self._all()
        except XditError:
            raise
        except Exception as error:  # a rule, or PyTorch, meets what no operator takes
            raise VerifyError(f"{self.where}, {self.place}: {type(error).__name__}: {error}") from error

    def _all(self) -> None:
        for name, block in self.program.blocks.items():
            self.place = f"block {name}"
            self._graph(block.graph)
        self.place = OUTER
        self._graph(self.program.graph)
        for node in self.program.calls:
            self._block_call(node)
        self._outputs()

    def fail(self, node: fx.Node, problem: str) -> None:
        raise VerifyError(f"{self.where}, {self.place}, {node.name}: {problem}")

    def _graph(self, graph: fx.Graph) -> None:
        graph.lint()
        mesh = self.program.layout_mesh
        for node in graph.nodes:
            if node.op == "output":
                continue
            if SPEC not in node.meta:
                self.fail(node, "has no type")
            if node.op == "get_attr":
                self._known(node)
            if mesh is not None:
                self._layouts(node, mesh)

    def _layouts(self, node: fx.Node, mesh: Mesh) -> None:
        layout = node.meta.get(LAYOUT)
        if layout is None:
            self.fail(node, "has no layout")
        elif node.op == "get_attr" and layout.is_whole and len(layout.dims) == len(node.meta[SPEC].shape):
            return  # as most weights: nothing else is asked of it
        for spec, one in _pairs(node):
            self._well_formed(node, mesh, spec, one)
        if node.op != "call_function" or is_block_call(node):
            return
        sources = operands(node)
        if ops.is_relayout(node.target):
            self._relayout(node, mesh, sources[0].meta[LAYOUT], node.meta[LAYOUT])
        elif node.target is operator.getitem:
            if sources[0].meta[LAYOUT][node.args[1]] != layout:
                self.fail(node, "has another layout than the result that it picks")
        else:
            self._operator(node, mesh)

    def _well_formed(self, node: fx.Node, mesh: Mesh, spec: TensorSpec, layout: Layout) -> None:
        if len(spec.shape) != len(layout.dims):
            self.fail(node, f"shape {spec.shape} has {len(layout.dims)} dims in its layout")
        used = set(layout.partial)
        for dim, (size, partition) in enumerate(zip(spec.shape, layout.dims, strict=True)):
            if partition is None:
                continue
            varies = mesh.dividing_dims(partition)
            if partition.size != size or len(partition.parts) != mesh.world_size:
                self.fail(node, f"dim {dim} of size {size} is divided as if it had size {partition.size}")
            if varies & used:
                self.fail(node, f"mesh dims {sorted(varies & used)} divide it twice")
            if not mesh.covers(partition):
                self.fail(node, f"some indices of dim {dim} are on no rank")
            used |= varies

    def _relayout(self, node: fx.Node, mesh: Mesh, have: Layout, want: Layout) -> None:
        if node.target is ops.all_reduce:
            right = bool(have.partial) and want == have.summed()
        elif node.target is ops.reduce_scatter:
            summed = have.partial - want.partial
            new = want.summed().dividing_dims(mesh) - have.summed().dividing_dims(mesh)
            right = want.partial <= have.partial and summed == new != frozenset()
            right = right and kind(mesh, have.summed(), want.summed())[0] == ops.shard.__name__
        else:
            right = have.partial == want.partial == frozenset() and kind(mesh, have, want)[0] == target_name(
                node.target
            )
        if not right:
            self.fail(node, f"is not the operator that changes {have} into {want}")

    def _operator(self, node: fx.Node, mesh: Mesh) -> None:
        layouts = tuple(source.meta[LAYOUT] for source in operands(node))
        inputs, outputs = self._infer(node, mesh, layouts)
        for place, (have, need) in enumerate(zip(layouts, inputs, strict=True)):
            if have != need:
                self.fail(node, f"operand {place} has a layout that {node.target} cannot take")
        if outputs != node.meta[LAYOUT]:
            self.fail(node, "its layout is not what the rules infer")
        if node.target is ops.unpack:
            self._unpacked(node)
        if self.runnable and node.target in ops.ATTENTIONS:
            allowed = {RING} if node.target is ops.ring_attention else set()
            astray = key_gather_dims(mesh, *layouts[:2]) - allowed
            if astray:
                self.fail(node, f"its keys are divided over {sorted(astray)} and nothing brings them together")
        if self.runnable and (parts := divided_statistics(node, layouts[0], mesh) if layouts else None):
            self.fail(node, f"its statistics are divided over {sorted(parts)} and nothing adds them up")

    def _infer(self, node: fx.Node, mesh: Mesh, layouts: tuple[Layout, ...]) -> tuple[tuple[Layout, ...], Outputs]:
        """What the rules say of a call. They see its operator, its arguments, and types and layouts of its operands."""
        types = tuple(source.meta[SPEC] for source in operands(node))
        key = (node.target, repr((node.args, node.kwargs)), types, node.meta[SPEC], layouts, mesh)
        if key not in self.inferred:
            sharding = infer(OpCall(node, mesh, layouts))
            self.inferred[key] = sharding.inputs, sharding.outputs
        return self.inferred[key]

    def _block_call(self, node: fx.Node) -> None:
        name, _, values, weights = call_parts(node)
        block = self.program.blocks.get(name)
        if block is None:
            self.fail(node, f"calls {name}, which does not exist")
        assert block is not None
        called = self._blocks.get(name)
        if called is None:
            called = self._blocks[name] = _Called.of(block.graph)
        if len(called.inputs) != len(values):
            self.fail(node, f"gives {len(values)} values to {len(called.inputs)} arguments of {name}")
        if called.needed != list(weights) or not called.in_order:
            self.fail(node, f"gives the weights {list(weights)} to {name}, which takes {called.needed}, in this order")
        types = list(map(_type, operands(node)))
        if types != called.types:
            pairs = zip(types, called.types, called.taken, strict=True)
            other = next(taken.name for given, wanted, taken in pairs if given != wanted)
            self.fail(node, f"argument {other} of {name} has another type")
        if self.program.layout_mesh is not None and node.meta[LAYOUT] != called.layouts:
            self.fail(node, f"the results of {name} have other layouts")

    def _known(self, node: fx.Node) -> None:
        """A body names no parameters: it is given them."""
        name = str(node.target)
        if self.place == OUTER and name in self.program.stored:
            self._stored(node, self.program.stored[name])
            return
        if self.place == OUTER and name in self.program.state:
            return
        owner, _, leaf = name.partition(".")
        if not (owner == CONSTANT and leaf in self.program.constants):
            self.fail(node, f"{name} is no parameter, buffer or constant of the program")

    def _stored(self, node: fx.Node, stored: Stored) -> None:
        if node.meta[SPEC] != held_spec(stored):
            self.fail(node, f"has another type than what is stored, {held_spec(stored)}")
        if wrong := problem(stored, self.program.state):
            self.fail(node, wrong)
        if any((user.target is ops.upload) is not stored.on_host for user in node.users):
            self.fail(node, "is uploaded if and only if it lies in the host's memory")

    def _unpacked(self, node: fx.Node) -> None:
        """What is taken out of stored bytes is one of the weights in them."""
        [source], (start, dtype, shape) = operands(node), node.args[1:]
        stored = self.program.stored.get(str(source_of(source).target))
        if stored is not None and not member_at(stored, self.program.state, start, dtype, shape):  # type: ignore[arg-type]
            self.fail(node, f"no weight of this type begins at byte {start} of what is stored")

    def _outputs(self) -> None:
        if self.program.layout_mesh is None:
            return
        for value in results_of(self.program.graph):
            if not value.meta[LAYOUT].is_whole:
                self.fail(value, "is an output of the model and not whole on every rank")


def _type(node: fx.Node) -> tuple[Any, Any]:
    return node.meta[SPEC], node.meta.get(LAYOUT)


def _pairs(node: fx.Node) -> list[tuple[Any, Any]]:
    spec, layout = node.meta[SPEC], node.meta[LAYOUT]
    if isinstance(spec, TensorSpec):
        return [(spec, layout)]
    return list(zip(spec, layout, strict=True))

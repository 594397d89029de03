"""A pipeline: for every stage and virtual rank `(cfg, patch, ring, ulysses)` the program that it runs in a step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.mesh import TIME, Mesh
from xdit_ir.printer import node_type
from xdit_ir.program import ONCE, SPEC, Block, Program, TensorSpec, is_block_call
from xdit_ir.rules.base import operands
from xdit_ir.runtime.buffers import Keep, Recall, Write
from xdit_ir.specialize import Specialize
from xdit_ir.stages import Stage, cut_stages


@dataclass(frozen=True, eq=False)
class Part:
    """What one stage does for one patch: its program takes the model's inputs and the message of the stage before, and
    returns the message for the next stage; the last stage returns the model's outputs with the last patch."""

    program: Program
    receives: tuple[str, ...]
    sends: tuple[str, ...]

    def message(self, *, sent: bool) -> tuple[TensorSpec, ...]:
        """Types of what is sent (or received)."""
        if sent:
            [output] = (node for node in self.program.graph.nodes if node.op == "output")
            return tuple(node.meta[SPEC] for node in operands(output)[: len(self.sends)])
        inputs = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        return tuple(node.meta[SPEC] for node in inputs[len(inputs) - len(self.receives) :])


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A program on a mesh whose dim `pipefusion` counts patches, cut into stages.

    `mesh` is that of the ranks, where `pipefusion` counts stages.
    """

    program: Program
    stages: int
    warmup_steps: int
    _parts: dict[tuple[int, int], Part] = field(default_factory=dict)
    _blocks: dict[int, Program] = field(default_factory=dict)

    @property
    def virtual(self) -> Mesh:
        """The mesh in which `pipefusion` counts patches."""
        assert self.program.mesh is not None
        return self.program.mesh

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.virtual.size((TIME,))

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of ranks."""
        cfg, _, ring, ulysses = self.virtual.sizes
        return Mesh.of(cfg, self.stages, ring, ulysses)

    def virtual_rank(self, rank: int, patch: int) -> int:
        """The virtual rank that a rank is while it computes a patch."""
        cfg, _, ring, ulysses = self.mesh.coordinates[rank]
        return self.virtual.coordinates.index((cfg, patch, ring, ulysses))

    def rank(self, stage: int, virtual: int) -> int:
        """The rank that computes a stage for a virtual rank."""
        cfg, _, ring, ulysses = self.virtual.coordinates[virtual]
        return self.mesh.coordinates.index((cfg, stage, ring, ulysses))

    @cached_property
    def cuts(self) -> tuple[Stage, ...]:
        """The stages, not yet of any rank."""
        return cut_stages(self.program, self.stages)

    def part(self, stage: int, virtual: int) -> Part:
        """What a stage does for a virtual rank."""
        key = (stage, virtual)
        if key not in self._parts:
            cut, patch = self.cuts[stage], self.virtual.index(virtual, (TIME,))
            outer = Specialize(virtual).apply(cut.program.replace(blocks={}))
            blocks = {name: self._body(virtual, name) for name in cut.program.blocks}
            self._parts[key] = _part(cut, outer.replace(blocks=blocks), patch, self.patches)
        return self._parts[key]

    def _body(self, virtual: int, name: str) -> Block:
        if virtual not in self._blocks:
            whole = Specialize(virtual).apply(self.program.replace(graph=fx.Graph()))
            patch = self.virtual.index(virtual, (TIME,))
            blocks = {n: replace(b, graph=_for_patch(b.graph, patch, self.patches)) for n, b in whole.blocks.items()}
            self._blocks[virtual] = whole.replace(blocks=blocks)
        return self._blocks[virtual].blocks[name]


def verify_pipeline(pipeline: Pipeline) -> None:
    """Raise `VerifyError` unless every message is received as it is sent, in the same order."""
    for virtual in range(pipeline.virtual.world_size):
        parts = [pipeline.part(stage, virtual) for stage in range(pipeline.stages)]
        if parts[0].receives or parts[-1].sends:
            raise VerifyError("the first stage receives nothing and the last sends nothing")
        for stage, (one, other) in enumerate(itertools.pairwise(parts)):
            if one.sends != other.receives or one.message(sent=True) != other.message(sent=False):
                raise VerifyError(
                    f"virtual rank {virtual}: stage {stage} sends {one.sends}, the next one receives {other.receives}"
                )


def pipeline_text(pipeline: Pipeline) -> str:
    """The stages as text: how many operators and block calls, and the message to the next stage with its types."""
    mesh = pipeline.virtual
    lines = [
        f"pipeline of {pipeline.stages} stages, {pipeline.patches} patches (in the layouts below: pipefusion), "
        f"{pipeline.warmup_steps} warmup steps {{"
    ]
    for number, stage in enumerate(pipeline.cuts):
        graph = stage.program.graph
        calls = sum(map(is_block_call, graph.nodes))
        work = sum(node.op == "call_function" for node in graph.nodes) - calls
        lines.append(f"  stage {number}: {calls} block calls, {work} operators")
        values = {node.name: node for node in graph.nodes}
        for name in stage.sends:
            once = ", once a step" if ONCE in values[name].meta else ""
            lines.append(f"    sends %{name}: {node_type(values[name], mesh)}{once}")
    return "\n".join([*lines, "}"])


def _part(cut: Stage, program: Program, patch: int, patches: int) -> Part:
    once = {node.name for node in program.graph.nodes if ONCE in node.meta} if patch else set()
    receives, sends = (tuple(n for n in names if n not in once) for names in (cut.receives, cut.sends))
    [output] = (node for node in program.graph.nodes if node.op == "output")
    values = operands(output)
    kept = [value for value, name in zip(values, cut.sends, strict=False) if name not in once]
    if patch == patches - 1:
        kept += values[len(cut.sends) :]
    graph = _for_patch(program.graph, patch, patches, received=cut.receives, outputs=kept)
    _remove_dead(graph, {name for name, block in program.blocks.items() if _has_effects(block.graph)})
    used = {str(node.args[0]) for node in graph.nodes if is_block_call(node)}
    blocks = {name: block for name, block in program.blocks.items() if name in used}
    return Part(program.replace(graph=graph, blocks=blocks), receives, sends)


def _for_patch(
    graph: fx.Graph,
    patch: int,
    patches: int,
    received: Sequence[str] = (),
    outputs: Sequence[fx.Node] | None = None,
) -> fx.Graph:
    """What is computed once a step is kept by the first patch and recalled by the others."""
    result = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            values = operands(node) if outputs is None else outputs
            result.output(tuple(env[value] for value in values))
            continue
        once = ONCE in node.meta and (node.op == "call_function" or node.name in received)
        shared = once and patches > 1 and node.meta[ONCE] and isinstance(node.meta.get(SPEC), TensorSpec)
        if once and patch > 0:
            if shared:
                env[node] = result.create_node("call_function", Recall(node.name, patch), (), name=node.name)
                env[node].meta = dict(node.meta)
            continue
        env[node] = result.node_copy(node, env.__getitem__)
        env[node].meta = dict(node.meta)
        if shared:
            kept = result.create_node("call_function", Keep(node.name, patch), (env[node],), name=f"{node.name}_keep")
            kept.meta = dict(node.meta)
            env[node] = kept
    if outputs is None:
        _remove_dead(result, set())
    return result


def _remove_dead(graph: fx.Graph, effects: set[str]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "get_attr") or isinstance(node.target, (Write, Keep)):
            continue
        if not (is_block_call(node) and node.args[0] in effects):
            graph.erase_node(node)


def _has_effects(graph: fx.Graph) -> bool:
    return any(isinstance(node.target, (Write, Keep)) for node in graph.nodes)

"""A pipeline: for every stage and virtual rank `(cfg, patch, ring, ulysses)` the program that it runs in a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir.buffer_ops import Keep, Recall, Write
from xdit_ir.ir.graphs import drop_unused_weights, fit_calls, operands, placeholders, remove_dead, results_of
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import (
    SPEC,
    Block,
    ComputeScope,
    Program,
    Stored,
    TensorSpec,
    called_block,
    is_block_call,
    scope_of,
)
from xdit_ir.pipefusion.stage_split import Stage, cut_stages
from xdit_ir.sharding.specialize import Specialize


@dataclass(frozen=True, eq=False)
class PatchStage:
    """What one stage does for one patch.

    Its program takes the model's inputs, the message of the stage before (`receives`) and what an earlier stage of this
    rank held for it (`carried_in`); it returns the message for the next stage (`sends`), what a later stage of this
    rank takes (`carried_out`), and in the last stage, with the last patch, the model's outputs. `carried_in` and
    `carried_out` are of one patch in one step; they are empty where each rank has one stage.
    """

    program: Program
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    carried_in: tuple[str, ...] = ()
    carried_out: tuple[str, ...] = ()

    def message(self, *, sent: bool) -> tuple[TensorSpec, ...]:
        """Types of what is sent (or received)."""
        if sent:
            return tuple(node.meta[SPEC] for node in results_of(self.program.graph)[: len(self.sends)])
        inputs = placeholders(self.program.graph)
        end = len(inputs) - len(self.carried_in)
        return tuple(node.meta[SPEC] for node in inputs[end - len(self.receives) : end])


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A program on a mesh whose dim `pipefusion` counts patches, cut into stages.

    `coordinates[stage]` is where along `pipefusion` a stage is computed: each on a rank of its own, or (folded) two on
    each rank, there and back again. `mesh` is that of the ranks. Buffers belong to one stage of one rank.
    """

    program: Program
    coordinates: tuple[int, ...]
    warmup_steps: int
    _parts: dict[tuple[int, int], PatchStage] = field(default_factory=dict)
    _blocks: dict[int, Program] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.coordinates)

    @property
    def stages_per_rank(self) -> int:
        """How many stages each rank has."""
        return self.stages // len(set(self.coordinates))

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
        return self.virtual.resized(TIME, len(set(self.coordinates)))

    def virtual_rank(self, rank: int, patch: int) -> int:
        """The virtual rank that a rank is while it computes a patch."""
        return self.virtual.rank_at(self.mesh.coordinate(rank) | {TIME: patch})

    def rank(self, stage: int, virtual: int) -> int:
        """The rank that computes a stage for a virtual rank."""
        return self.mesh.rank_at(self.virtual.coordinate(virtual) | {TIME: self.coordinates[stage]})

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank computes, in their order."""
        place = self.mesh.index(rank, (TIME,))
        return tuple(stage for stage, coordinate in enumerate(self.coordinates) if coordinate == place)

    def weights_of(self, rank: int) -> tuple[str, ...]:
        """Names of the parameters and buffers that a rank uses, in the order of their first use."""
        names: dict[str, None] = {}
        for program in self._programs_of(rank):
            names |= dict.fromkeys(_weights(program))
        return tuple(names)

    def stored_of(self, rank: int) -> dict[str, Stored]:
        """What a rank stores in parts, by name."""
        found: dict[str, Stored] = {}
        for program in self._programs_of(rank):
            found |= {name: program.stored[name] for name in _weights(program) if name in program.stored}
        return found

    def _programs_of(self, rank: int) -> Iterator[Program]:
        for stage, patch in itertools.product(self.stages_of(rank), range(self.patches)):
            yield self.part(stage, self.virtual_rank(rank, patch)).program

    def issue_order(self, stage: int, step: int, patch: int) -> int:
        """When a stage computes a patch of a displaced step, in units of the time of one stage.

        Each rank works in this order, which never waits for something that comes later; no two turns of a rank are
        equal, and none is idle where there are at least as many patches as ranks.
        """
        patches = max(self.patches, self.stages // self.stages_per_rank)
        return stage + self.stages_per_rank * (step * patches + patch)

    @cached_property
    def cuts(self) -> tuple[Stage, ...]:
        """The stages, not yet of any rank."""
        return cut_stages(self.program, self.coordinates)

    def part(self, stage: int, virtual: int) -> PatchStage:
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


def _weights(program: Program) -> Iterator[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "get_attr")
    return (name for name in names if name in program.state or name in program.stored)


def verify_pipeline(pipeline: Pipeline) -> None:
    """Raise `VerifyError` unless every message is received as it is sent, in the same order, and between ranks only,
    and everything that a stage takes is held by an earlier one of its rank."""
    for virtual in range(pipeline.virtual.world_size):
        parts = [pipeline.part(stage, virtual) for stage in range(pipeline.stages)]
        if parts[0].receives or parts[-1].sends:
            raise VerifyError("the first stage receives nothing and the last sends nothing")
        for stage, part in enumerate(parts):
            mine = [s for s in range(stage) if pipeline.coordinates[s] == pipeline.coordinates[stage]]
            if stage - 1 in mine and part.receives:
                raise VerifyError(f"virtual rank {virtual}: stage {stage} receives {part.receives} from its own rank")
            if missing := [name for name in part.carried_in if not any(name in parts[s].carried_out for s in mine)]:
                raise VerifyError(
                    f"virtual rank {virtual}: stage {stage} takes {missing}, which its rank does not hold"
                )
        for stage, (one, other) in enumerate(itertools.pairwise(parts)):
            if one.sends != other.receives or one.message(sent=True) != other.message(sent=False):
                raise VerifyError(
                    f"virtual rank {virtual}: stage {stage} sends {one.sends}, the next one receives {other.receives}"
                )


def pipeline_text(pipeline: Pipeline) -> str:
    """The stages as text: how many operators and block calls, and with their types the message to the next stage and
    what a later stage of the same rank takes."""
    mesh = pipeline.virtual
    on = f" folded over {pipeline.mesh.size((TIME,))}" if pipeline.stages_per_rank > 1 else ""
    lines = [
        f"pipeline of {pipeline.stages} stages{on}, {pipeline.patches} patches (in the layouts below: pipefusion), "
        f"{pipeline.warmup_steps} warmup steps {{"
    ]
    for number, stage in enumerate(pipeline.cuts):
        calls, work = stage.counts()
        place = f" at {pipeline.coordinates[number]}" if on else ""
        lines.append(f"  stage {number}{place}: {calls} block calls, {work} operators")
        for verb, names in (("sends", stage.sends), ("holds", stage.carried_out)):
            lines += [f"    {verb} {text}" for text in stage.passed(names, mesh)]
    return "\n".join([*lines, "}"])


def _part(cut: Stage, program: Program, patch: int, patches: int) -> PatchStage:
    once = {node.name for node in program.graph.nodes if scope_of(node).is_once} if patch else set()
    wanted = [
        tuple(n for n in names if n not in once) for names in (cut.receives, cut.sends, cut.carried_in, cut.carried_out)
    ]
    passed = (*cut.sends, *cut.carried_out)
    values = results_of(program.graph)
    kept = [value for value, name in zip(values, passed, strict=False) if name not in once]
    if patch == patches - 1:
        kept += values[len(passed) :]
    graph = _for_patch(program.graph, patch, patches, received=(*cut.receives, *cut.carried_in), outputs=kept)
    remove_dead(graph, partial(has_effect, program))
    fit_calls(graph, program.blocks)
    remove_dead(graph, partial(has_effect, program))  # what brought weights that only the first patch uses
    return PatchStage(program.with_graph(graph), *wanted)


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
        once = scope_of(node).is_once and (node.op == "call_function" or node.name in received)
        shared = once and patches > 1 and scope_of(node) is ComputeScope.SHARED
        shared = shared and isinstance(node.meta.get(SPEC), TensorSpec)
        if once and patch > 0:
            if shared:
                env[node] = result.create_node("call_function", Recall(node.name, patch), (), name=node.name)
                env[node].meta = dict(node.meta)
            continue
        env[node] = result.node_copy(node, env.__getitem__)
        if shared:
            kept = result.create_node("call_function", Keep(node.name, patch), (env[node],), name=f"{node.name}_keep")
            kept.meta = dict(node.meta)
            env[node] = kept
    if outputs is None:
        remove_dead(result, _writes)
        drop_unused_weights(result)
    return result


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, (Write, Keep))


def has_effect(program: Program, node: fx.Node) -> bool:
    """Whether a node writes to a buffer, itself or in the block that it calls."""
    return _writes(node) or (is_block_call(node) and any(map(_writes, program.blocks[called_block(node)].graph.nodes)))

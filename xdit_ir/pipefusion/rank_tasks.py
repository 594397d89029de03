"""What one rank of a pipeline runs: a program for every patch of its stages, and one for all patches together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Read, Write
from xdit_ir.ir.collective_ops import Communicate
from xdit_ir.ir.graphs import copy_graph, map_graphs, operands, remove_dead, results_of
from xdit_ir.ir.partition import Indices, Runs
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.pipefusion.interleave_patches import interleave, of_patch
from xdit_ir.pipefusion.latents import latents, without
from xdit_ir.pipefusion.pipeline_program import PatchStage, Pipeline, has_effect

Specs = tuple[TensorSpec, ...]
Held = tuple[str, int]


@dataclass(frozen=True)
class PatchCut:
    """How an output (and the latents) is divided over patches: `parts[p]` of dimension `dim` belong to patch p."""

    dim: int
    parts: tuple[Indices, ...]

    @property
    def size(self) -> int:
        """Positions of all patches."""
        return sum(part.size for part in self.parts)

    def meeting(self, wanted: Indices) -> tuple[int, ...]:
        """The patches that have something of what is wanted."""
        return tuple(p for p, part in enumerate(self.parts) if part.within(wanted).size)

    def joined(self, patches: Sequence[int]) -> Indices:
        """What these patches have, in order of position."""
        runs = sorted(run for patch in patches for run in self.parts[patch].runs)
        return Indices.of_runs(runs)


@dataclass(frozen=True)
class Need:
    """An input of a program: all of it, or what the `patches` have of its cut."""

    name: str
    patches: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class StageTask:
    """One run of a stage: `program` takes the `needs`, then the `feed`, and returns what is sent, what is held for a
    later stage of this rank, and results.

    `feed`: for each input, its place in the message that is received, or the name and patch of a value that is held.
    """

    program: Program
    needs: tuple[Need, ...]
    feed: tuple[int | Held, ...]
    receives: Specs
    sends: Specs
    carried_out: tuple[Held, ...]
    results: Specs


@dataclass(frozen=True, eq=False)
class RankTasks:
    """Everything that one rank runs. Made without the other ranks."""

    pipeline: Pipeline
    rank: int

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank."""
        return self.pipeline.stages_of(self.rank)

    def virtual(self, patch: int) -> int:
        """The virtual rank that this rank is for a patch."""
        return self.pipeline.virtual_rank(self.rank, patch)

    def ranks(self) -> tuple[int, ...]:
        """The ranks of all stages that work together with this one, by stage."""
        return tuple(self.pipeline.rank(stage, self.virtual(0)) for stage in range(self.pipeline.stages))

    @cached_property
    def cuts(self) -> tuple[PatchCut | None, ...]:
        """How each output of the model is divided over patches; None where it is had with the last patch, whole."""
        last = [self._part(self.pipeline.stages - 1, patch) for patch in range(self.pipeline.patches)]
        return tuple(_cut(value, last) for value in results_of(last[-1].program.graph))

    @cached_property
    def latents(self) -> dict[str, PatchCut]:
        """The inputs that are divided over patches like an output."""
        found: dict[str, PatchCut] = {}
        for name in latents(self.pipeline.program, self.pipeline.virtual):
            [node] = (n for n in self.pipeline.program.graph.nodes if n.op == "placeholder" and n.name == name)
            shape = node.meta[SPEC].shape
            for cut, output in zip(self.cuts, results_of(self.pipeline.program.graph), strict=True):
                own = None if cut is None else _own_dim(cut, output.meta[SPEC].shape, shape)
                if cut is not None and own is not None:
                    found.setdefault(name, replace(cut, dim=own))
        return found

    @cached_property
    def displaced(self) -> dict[tuple[int, int], StageTask]:
        """What is run for a stage and a patch."""
        return {(s, p): self._alone(s, p) for s in self.stages for p in range(self.pipeline.patches)}

    @cached_property
    def synchronous(self) -> dict[int, StageTask]:
        """What is run for a stage and all patches."""
        return {s: self._together(s) for s in self.stages}

    def result_types(self, patch: int) -> Specs:
        """Types of what the last stage gives for a patch, whichever rank that is."""
        program = self._part(self.pipeline.stages - 1, patch).program
        return tuple(value.meta[SPEC] for value in self._results(program, patch))

    def _part(self, stage: int, patch: int) -> PatchStage:
        return self.pipeline.part(stage, self.virtual(patch))

    def _finished(self, stage: int, patch: int) -> tuple[Program, Specs]:
        """A part that returns the patch's own part of the outputs, and the types of those."""
        part = self._part(stage, patch)
        if stage < self.pipeline.stages - 1:
            return _mapped(part.program, self), ()
        results = self._results(part.program, patch)
        types = tuple(value.meta[SPEC] for value in results)
        return _mapped(_returning(part.program, results), self), types

    def _results(self, program: Program, patch: int) -> list[fx.Node]:
        last = self._part(self.pipeline.stages - 1, self.pipeline.patches - 1).program
        slots = [
            _slot(value) if cut is not None else ""
            for value, cut in zip(results_of(last.graph), self.cuts, strict=True)
        ]
        whole = iter(results_of(program.graph)) if patch == self.pipeline.patches - 1 else None
        results = []
        for slot in slots:
            value = next(whole) if whole is not None else None
            if slot:
                results.append(operands(_write(program, slot))[0])
            elif value is not None:
                results.append(value)
        return results

    def _alone(self, stage: int, patch: int) -> StageTask:
        program, results = self._finished(stage, patch)
        part = self._part(stage, patch)
        program, needs = _trimmed(program, {*part.receives, *part.carried_in}, self.latents)
        feed = _feed([(part, patch)])
        carried_out = tuple((name, patch) for name in part.carried_out)
        return StageTask(program, needs, feed, part.message(sent=False), part.message(sent=True), carried_out, results)

    def _together(self, stage: int) -> StageTask:
        patches = range(self.pipeline.patches)
        if len(patches) == 1:
            return self.displaced[stage, 0]
        parts, finished = [self._part(stage, p) for p in patches], [self._finished(stage, p) for p in patches]
        own = {name for part in parts for name in (*part.receives, *part.carried_in)}
        program = interleave([program for program, _ in finished], own)
        counts = [
            (len(part.sends), len(part.carried_out), len(r)) for part, (_, r) in zip(parts, finished, strict=True)
        ]
        _sort_outputs(program, counts)
        program, needs = _trimmed(program, {of_patch(name, patch) for name in own for patch in patches}, {})
        return StageTask(
            program,
            needs,
            _feed(list(zip(parts, patches, strict=True))),
            tuple(spec for part in parts for spec in part.message(sent=False)),
            tuple(spec for part in parts for spec in part.message(sent=True)),
            tuple((name, patch) for part, patch in zip(parts, patches, strict=True) for name in part.carried_out),
            tuple(spec for _, results in finished for spec in results),
        )


def _own_dim(cut: PatchCut, output: Sequence[int], shape: Sequence[int]) -> int | None:
    """The dim of an input of this shape that is cut like the output's; codes lack the dim of their scores."""
    if cut.dim < len(shape) and cut.size == shape[cut.dim]:
        return cut.dim
    lacks = (dim for dim in range(cut.dim) if without(output, dim) == tuple(shape))
    return None if next(lacks, None) is None else cut.dim - 1


def _feed(parts: Sequence[tuple[PatchStage, int]]) -> tuple[int | Held, ...]:
    """What the inputs behind the model's own get, patch by patch: what is received, then what is held."""
    feed: list[int | Held] = []
    place = 0
    for part, patch in parts:
        feed += range(place, place + len(part.receives))
        feed += [(name, patch) for name in part.carried_in]
        place += len(part.receives)
    return tuple(feed)


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")


def _slot(value: fx.Node) -> str:
    """The slot in which the parts of an output are collected; empty if it is no such thing."""
    target = value.target
    if not isinstance(target, Read) or target.summed or any(places is not None for places in target.places):
        return ""
    return target.slot


def _write(program: Program, slot: str) -> fx.Node:
    found: list[fx.Node] = [n for n in program.graph.nodes if isinstance(n.target, Write) and n.target.slot == slot]
    [write] = found
    return write


def _cut(value: fx.Node, parts: Sequence[PatchStage]) -> PatchCut | None:
    """How the parts of the patches lie in an output, if along one dimension and none twice."""
    slot = _slot(value)
    if not slot:
        return None
    targets = [_write(part.program, slot).target for part in parts]
    places = [target.places for target in targets if isinstance(target, Write)]
    dims = {dim for place in places for dim, runs in enumerate(place) if runs is not None}
    if len(dims) != 1 or value.meta[SPEC].shape != targets[0].shape:  # type: ignore[union-attr]
        return None
    [dim] = dims
    size = value.meta[SPEC].shape[dim]
    cut = PatchCut(dim, tuple(Indices(((0, size),) if place[dim] is None else place[dim] or ()) for place in places))
    return cut if cut.size == cut.joined(range(len(parts))).size == size else None


def _returning(program: Program, results: Sequence[fx.Node]) -> Program:
    """The program of a last stage with other results; buffers that only these were collected in are gone."""
    graph = copy_graph(program.graph)
    values = {node.name: node for node in graph.nodes}
    outputs = tuple(values[node.name] for node in results)
    [output] = (node for node in graph.nodes if node.op == "output")
    output.args = (outputs,)
    unread = {node for node in graph.nodes if isinstance(node.target, Write) and operands(node)[0] in outputs}
    remove_dead(graph, lambda node: has_effect(program, node) and node not in unread)
    return program.replace(graph=graph)


def _mapped(program: Program, work: RankTasks) -> Program:
    """The program whose communications name ranks instead of virtual ranks."""
    stage = work.ranks().index(work.rank)

    def rename(graph: fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, Communicate):
                group = tuple(work.pipeline.rank(stage, member) for member in node.target.group)
                node.target = replace(node.target, group=group)

    return map_graphs(program, rename)


def _sort_outputs(program: Program, counts: Sequence[tuple[int, ...]]) -> None:
    """Outputs by kind instead of by patch; of each patch there are so many of each kind."""
    [output] = (node for node in program.graph.nodes if node.op == "output")
    values = iter(operands(output))
    kinds: list[list[fx.Node]] = [[] for _ in counts[0]]
    for patch in counts:
        for kind, count in zip(kinds, patch, strict=True):
            kind += itertools.islice(values, count)
    output.args = (tuple(itertools.chain(*kinds)),)


def _trimmed(
    program: Program, received: Collection[str], cuts: dict[str, PatchCut]
) -> tuple[Program, tuple[Need, ...]]:
    """The program without inputs that it does not use, which takes of the latents what it needs."""
    needs = []
    for node in list(_placeholders(program.graph)):
        if node.name in received:
            continue
        if not node.users:
            program.graph.erase_node(node)
            continue
        needs.append(Need(node.name, _narrowed(node, cuts[node.name]) if node.name in cuts else None))
    return program, tuple(needs)


def _narrowed(node: fx.Node, cut: PatchCut) -> tuple[int, ...] | None:
    """The patches that have what a program takes of an input; its `take`s then are of what those have together."""
    carried_in = _takes(node, cut.dim)
    if carried_in is None:
        return None
    runs: set[tuple[int, int]] = {run for take in carried_in for run in _runs(take)}
    wanted = Indices.of_runs(sorted(runs))
    patches = cut.meeting(wanted)
    held = cut.joined(patches)
    for take in carried_in:
        take.args = (take.args[0], cut.dim, held.positions(Indices(_runs(take))).runs)
    return patches


def _runs(take: fx.Node) -> Runs:
    runs: Any = take.args[2]
    return tuple(runs)


def _takes(node: fx.Node, dim: int) -> list[fx.Node] | None:
    """The first `take`s along a dimension; None if something else uses the value before."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target is not ops.take:
            return None
        if user.args[1] == dim:
            found.append(user)
            continue
        further = _takes(user, dim)
        if further is None:
            return None
        found += further
    return found

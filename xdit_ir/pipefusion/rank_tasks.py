"""What one rank of a pipeline runs: a program for every patch of its stages, and one for all patches together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from xdit_ir.ir.buffer_ops import Write
from xdit_ir.ir.collective_ops import Communicate
from xdit_ir.ir.graphs import copy_graph, map_graphs, operands, placeholders, remove_dead, results_of
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.pipefusion.interleave_patches import interleave, of_patch
from xdit_ir.pipefusion.latents import latents
from xdit_ir.pipefusion.patch_cut import PatchCut, cut_like, cut_of, narrowed, slot_of, write_to
from xdit_ir.pipefusion.pipeline_program import PatchStage, Pipeline, has_effect

Specs = tuple[TensorSpec, ...]
Held = tuple[str, int]


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
        return tuple(cut_of(value, last) for value in results_of(last[-1].program.graph))

    @cached_property
    def returned(self) -> tuple[str | None, ...]:
        """Of each output the name of the input that it is, as it was given (a cache); None: it is made."""
        values = results_of(self.pipeline.program.graph)
        return tuple(value.name if value.op == "placeholder" else None for value in values)

    @cached_property
    def latents(self) -> dict[str, PatchCut]:
        """The inputs that are divided over patches like an output; none where all outputs are had with the last one."""
        program, virtual = self.pipeline.program, self.pipeline.virtual
        found = latents(program, virtual) if any(cut is not None for cut in self.cuts) else {}
        return {name: cut_like(one, virtual) for name, one in found.items()}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the model's inputs, in their order."""
        return tuple(node.name for node in placeholders(self.pipeline.program.graph))

    def places(self, output: int) -> tuple[int | None, ...]:
        """Where an output is among the results of each patch; None: with the last patch only, or an input."""
        last = self.pipeline.patches - 1
        if self.returned[output] is not None:
            return (None,) * (last + 1)
        before = sum(cut is not None for cut in self.cuts[:output])
        whole = sum(name is None for name in self.returned[:output])
        divided = self.cuts[output] is not None
        return tuple(whole if patch == last else before if divided else None for patch in range(last + 1))

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Where the results of each patch begin among those of all patches."""
        counts = [len(self.result_types(patch)) for patch in range(self.pipeline.patches)]
        return tuple(itertools.accumulate(counts[:-1], initial=0))

    def assembled(self, results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The model's outputs, of the results of all patches and its inputs."""
        found = []
        for output, (cut, name) in enumerate(zip(self.cuts, self.returned, strict=True)):
            if name is not None:
                found.append(inputs[self.inputs.index(name)])
                continue
            pairs = zip(self.firsts, self.places(output), strict=True)
            parts = [results[first + place] for first, place in pairs if place is not None]
            found.append(parts[0] if cut is None else cut.assembled(parts))
        return tuple(found)

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
            slot_of(value) if cut is not None else ""
            for value, cut in zip(results_of(last.graph), self.cuts, strict=True)
        ]
        whole = iter(results_of(program.graph)) if patch == self.pipeline.patches - 1 else None
        results = []
        for slot, name in zip(slots, self.returned, strict=True):
            value = next(whole) if whole is not None else None
            if name is not None:
                continue
            if slot:
                results.append(operands(write_to(program, slot))[0])
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
        program = interleave([program for program, _ in finished], own, self.pipeline.cuts[stage].program)
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


def _feed(parts: Sequence[tuple[PatchStage, int]]) -> tuple[int | Held, ...]:
    """What the inputs behind the model's own get, patch by patch: what is received, then what is held."""
    feed: list[int | Held] = []
    place = 0
    for part, patch in parts:
        feed += range(place, place + len(part.receives))
        feed += [(name, patch) for name in part.carried_in]
        place += len(part.receives)
    return tuple(feed)


def _returning(program: Program, results: Sequence[fx.Node]) -> Program:
    """The program of a last stage with other results; buffers that only these were collected in are gone."""
    graph = copy_graph(program.graph)
    values = {node.name: node for node in graph.nodes}
    outputs = tuple(values[node.name] for node in results)
    graph.output_node().args = (outputs,)
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
    output = program.graph.output_node()
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
    for node in placeholders(program.graph):
        if node.name in received:
            continue
        if not node.users:
            program.graph.erase_node(node)
            continue
        needs.append(Need(node.name, narrowed(node, cuts[node.name]) if node.name in cuts else None))
    return program, tuple(needs)

"""`displace-patches`: divide the token streams over patches in time, and each patch over `ring` and `ulysses`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, TIME, Mesh
from xdit_ir.ir.partition import Indices, Partition, even_pieces
from xdit_ir.ir.program import LAYOUT, SPEC, Program, Seeding, TokenAxis
from xdit_ir.passes.find_tokens import parts_outside, units_of
from xdit_ir.pipefusion.latents import inputs_of, output_seeds, where_latents_join
from xdit_ir.pipefusion.patch_plan import UNLIKE, PatchPlan, evaluate
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.propagate import Propagation, Seeds

MANY = 3  # streams beside that of the latents
NEAREST = 4  # smaller numbers of patches that are tried where one is refused


@dataclass(frozen=True)
class DisplacePatches:
    """PipeFusion's division of the tokens (arXiv 2405.14430): the latents' stream into patches, in whole rows or frames
    where views have such units; streams that do not depend on the latents (text) go with the first patch.

    The cheapest of the proposals is taken that is not refused, see `xdit_ir.pipefusion.patch_plan`.
    """

    name: ClassVar[str] = "displace-patches"
    numerics: ClassVar[str] = "stale"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.SEEDS})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS, Fact.ATTENTION, Fact.RUNNABLE})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with the division over `pipefusion` (patches), `ring` and `ulysses` noted as seeds."""
        seeds = self._best(program) if self.mesh.size((TIME,)) > 1 else {}
        return program.replace(seeding=Seeding(self.mesh, seeds))

    def _best(self, program: Program) -> Seeds:
        best, reason = self._search(program)
        if best is None:
            nearest, patches = self._nearest(program), self.mesh.size((TIME,))
            raise ParallelizeError(
                f"patches={patches} cannot divide the latents in time: {reason}; use patches={nearest}", patches=nearest
            )
        return best[1]

    def _search(self, program: Program) -> tuple[tuple[PatchPlan, Seeds] | None, str]:
        """The cheapest proposal for the first stream for which one is not refused; else why the first one was."""
        best: tuple[PatchPlan, Seeds] | None = None
        chosen: TokenAxis | None = None
        refused: list[str] = []
        for axis, plan, seeds in self._plans(program):
            if chosen not in (None, axis):
                break
            if plan.refusal:
                refused.append(plan.refusal)
            elif best is None or plan.price < best[0].price:
                best, chosen = (plan, seeds), axis
        streams = any(not axis.is_context for axis in program.tokens)
        otherwise = UNLIKE if streams else "no attention takes its queries from a token stream"
        return best, refused[0] if refused else otherwise

    def _plans(self, program: Program) -> Iterator[tuple[TokenAxis, PatchPlan, Seeds]]:
        """All proposals, stream by stream."""
        trial = Propagation(program, self.mesh)
        queries = [axis for axis in program.tokens if not axis.is_context]
        streams = [axis for axis in queries if inputs_of(program, axis.value)]
        joined = (where_latents_join(program, axis) for axis in queries if not streams)
        for axis in (*streams, *(axis for axis in joined if axis is not None)):
            first = self._first(trial, axis)
            load, tried, accepted = sum(other.size for other in first), set[Partition](), False
            outside = replace(axis, segments=tuple(sorted(parts_outside(program, axis.size))))
            # How the outer graph cuts, with what is behind where it was put, is tried where nothing else is right.
            for one, behind in ((axis, False), (outside, False), (outside, True)):
                found = () if accepted else self._partitions(program, one, load, behind=behind)
                fresh = [cut for cut in found if cut not in tried]
                for partition in fresh:
                    plan, seeds = self._plan(trial, axis, self._seeds(program, axis, partition, first))
                    accepted |= not plan.refusal
                    yield axis, plan, seeds
                tried.update(fresh)

    def _nearest(self, program: Program) -> int:
        """The largest smaller number of patches that is not refused, of the nearest ones and the powers of two."""
        smaller = [self._of(count) for count in range(self.mesh.size((TIME,)) - 1, 1, -1)]
        able = [one for one in smaller if any(list(one._partitions(program, axis, 0)) for axis in program.tokens)]
        for place, one in enumerate(able):
            count = one.mesh.size((TIME,))
            tried = place < NEAREST or count & (count - 1) == 0
            if tried and any(not plan.refusal for _, plan, _ in one._plans(program)):
                return count
        return 1

    def _of(self, patches: int) -> DisplacePatches:
        return replace(self, mesh=self.mesh.resized(TIME, patches))

    def _plan(self, trial: Propagation, axis: TokenAxis, seeds: Seeds) -> tuple[PatchPlan, Seeds]:
        """The division that these seeds give, and they; where it is refused, the one that comes of cutting the latents
        like the output instead, for what is computed from the latents before the stream begins."""
        plan = evaluate(trial.run(seeds), self.mesh, self.machine)
        inputs = output_seeds(plan.program, self.mesh) if plan.refusal else {}
        if not inputs:
            return plan, seeds
        others = {name: layouts for name, layouts in seeds.items() if name != axis.value}
        wanted = {name: (layout,) for name, layout in inputs.items()} | others
        again = evaluate(trial.run(wanted), self.mesh, self.machine)
        return (plan, seeds) if again.refusal else (again, wanted)

    def _first(self, trial: Propagation, axis: TokenAxis) -> list[TokenAxis]:
        """The streams that go with the first patch: those of queries which the latents do not reach, and which then
        take less work (a second, short stream of latents), or no more work and no more that is published."""
        program = trial.program
        latents, chosen = inputs_of(program, axis.value), list[TokenAxis]()
        partition = next(self._partitions(program, axis, 0), None)
        if partition is None:
            return []
        best = evaluate(trial.run(self._seeds(program, axis, partition, [])), self.mesh, self.machine)
        others = [other for other in program.tokens if not other.is_context and other.value != axis.value]
        others = [other for other in others if (source := inputs_of(program, other.value)) and not source & latents]
        together = [others] if len(others) > MANY else []  # many short texts: tried one by one only if they must be
        for more in (*together, *([other] for other in others)):
            if any(other in chosen for other in more):
                continue
            plan = evaluate(trial.run(self._seeds(program, axis, partition, [*chosen, *more])), self.mesh, self.machine)
            cheaper = (plan.price.work, plan.price.bytes) <= (best.price.work, best.price.bytes)
            if cheaper and (best.refusal or not plan.refusal):
                best = plan
                chosen += more
        return chosen

    def _seeds(self, program: Program, axis: TokenAxis, partition: Partition, first: Sequence[TokenAxis]) -> Seeds:
        seeds = {axis.value: (self._layout(program, axis, partition),)}
        return seeds | {one.value: (self._layout(program, one, _first(self.mesh, one.size)),) for one in first}

    def _partitions(self, program: Program, axis: TokenAxis, load: int, *, behind: bool = False) -> Iterator[Partition]:
        """Divisions of the latents' stream, where the first patch has `load` tokens besides; what is `behind` a segment
        goes with the last patch, where it is not to go with the first."""
        found = (self._divide(cut, axis.size, load, behind=behind) for cut in _cuts(program, axis))
        yield from dict.fromkeys(partition for partition in found if partition is not None)

    def _layout(self, program: Program, axis: TokenAxis, partition: Partition) -> Layout:
        node = next(node for node in program.graph.nodes if node.name == axis.value)
        layout: Layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
        return layout.with_dims({axis.dim: partition})

    def _divide(self, cut: _StreamCut, size: int, load: int, *, behind: bool) -> Partition | None:
        """The stream's patches; None where there are fewer units than patches."""
        count, (main, start) = self.mesh.size((TIME,)), cut.main
        if main % cut.period or cut.period % cut.unit or cut.period // cut.unit < count:
            return None
        repeats = main // cut.period
        rest = size - start - main if behind else 0
        loads = (load + size - main - rest) / repeats / cut.unit, rest / repeats / cut.unit
        sizes = _sizes(cut.period // cut.unit, count, *loads)
        ends = [cut.unit * end for end in itertools.accumulate(sizes, initial=0)]
        pieces = []
        for patch in range(count):
            runs = [(start + i * cut.period + ends[patch], ends[patch + 1] - ends[patch]) for i in range(repeats)]
            holds_rest = patch == (count - 1 if behind else 0)
            around = (0, 0 if patch else start), (start + main, size - start - main if holds_rest else 0)
            pieces.append(Indices.of_runs([around[0], *runs, around[1]]))
        return _spread(self.mesh, size, pieces)


@dataclass(frozen=True)
class _StreamCut:
    """Every `period` of the segment `main` (its length and start) is divided in whole units; what is around the
    segment goes with the first patch."""

    main: tuple[int, int]
    period: int
    unit: int


def _cuts(program: Program, axis: TokenAxis) -> Iterator[_StreamCut]:
    """Whole frames or rows before single tokens, the stream as one before each frame for itself."""
    for segments in ((axis.size,), *axis.segments):
        for place, main in enumerate(segments):
            units = axis.units if main == axis.size else units_of(program, main)
            for period in (main, *reversed(units)):
                for unit in (*reversed(units), 1):
                    if unit < period <= main:
                        yield _StreamCut((main, sum(segments[:place])), period, unit)


def _sizes(size: int, count: int, load: float, load_behind: float = 0) -> list[int]:
    """How much each patch gets of `size`, at least 1, where the first one has `load` to do besides, and the last one
    `load_behind`."""
    share = (size + load + load_behind) / count
    first = min(max(1, round(share - load)), size - count + 1)
    if not load_behind:
        return [first, *(piece.size for piece in even_pieces(size - first, count - 1))]
    last = min(max(1, round(share - load_behind)), size - first - count + 2) if count > 2 else size - first
    between = even_pieces(size - first - last, count - 2) if count > 2 else []
    return [first, *(piece.size for piece in between), last]


def _first(mesh: Mesh, size: int) -> Partition:
    pieces = [Indices.range(0, size), *(Indices(()) for _ in range(mesh.size((TIME,)) - 1))]
    return _spread(mesh, size, pieces)


def _spread(mesh: Mesh, size: int, pieces: list[Indices]) -> Partition:
    """Patches, each divided evenly over the ranks of a sequence group."""
    count = mesh.size(SEQUENCE)
    parts = []
    for rank in range(mesh.world_size):
        piece = pieces[mesh.index(rank, (TIME,))]
        parts.append(piece.at(even_pieces(piece.size, count)[mesh.index(rank, SEQUENCE)]))
    return Partition(size, tuple(parts))

"""`split-batch`: classifier-free-guidance parallelism, the batch divided over the mesh dim `cfg`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar

from torch import fx

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import BATCH, Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TokenAxis
from xdit_ir.passes.find_tokens import JOINS, borders_of, divides, joined_dim
from xdit_ir.passes.packed import told_apart
from xdit_ir.passes.streams import leading_values
from xdit_ir.sharding.assignment import Assignment
from xdit_ir.sharding.cost import program_flops
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.propagate import Propagation, Seeds

# Dividing a batch at least nearly halves the work; a cut that leaves more than this divides something else.
WORTH = 0.9
# More cuts are looked for where the work exceeds a fair share by more than this, and kept where they save so much.
BALANCED, FURTHER = 1.01, 0.995
LARGE = 8  # samples, or calls of a step; more are seldom
PARTS = ("queries", "keys")  # of attention: both are divided where a sequence of several samples is cut between them
TRIALS = 8  # of cuts between packed samples


class Batch(Enum):
    """What the mesh dim `cfg` does: its ranks divide the batch, each has a sample at least; or they share samples where
    there are fewer; or they run different calls, and the batch stays whole."""

    DIVIDED = "divided"
    SHARED = "shared"
    CALLS = "calls"


@dataclass(frozen=True)
class _Choice:
    work: int
    ticks: int
    size: int
    seeds: Seeds
    attempt: Assignment


@dataclass(frozen=True)
class SplitBatch:
    """Cut the batch of one input and let demand cut the others; the outputs are gathered.

    A batch that the model takes apart and puts together again is cut once more behind that, and before. Where there is
    no batch since samples are packed in one sequence, that is cut between samples, which joins, splits or masks of
    known contents tell apart. If `shared`, ranks may hold the same samples where there are fewer of them.
    """

    name: ClassVar[str] = "split-batch"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})

    mesh: Mesh
    shared: bool = False
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with the batch divided, of all choices of the leading input the one with the least work."""
        degree = self.mesh.size((BATCH,))
        if degree == 1:
            return program
        trial = Propagation(program, self.mesh)
        values = [node for node in leading_values(program.graph) if node.meta[SPEC].shape]
        inputs = [node for node in program.graph.nodes if node in values and node.op == "placeholder"]
        whole = program_flops(program, None)[0]
        tried: list[_Choice] = []
        further = [node for node in batched_inputs(program) if node not in inputs]
        joined = [node for node in values if node not in inputs and node.meta[SPEC].shape[0] >= degree]
        for group in (inputs, further, joined):
            tried += [choice for node in group if (choice := self._tried(trial, node, {})) is not None]
            best = min(tried, key=lambda one: one.ticks, default=None)
            if best is not None and best.work <= WORTH * whole:
                break
        if best is None or best.work > WORTH * whole:
            sizes = [one.size for one in tried] or [node.meta[SPEC].shape[0] for node in batched_inputs(program)]
            batch = min(sizes, default=0)
            packed = self._packed(trial, program) if batch >= degree else None
            if packed is not None and packed.work <= WORTH * whole:
                return _with_tokens(packed.attempt.program().replace(mesh=self.mesh), packed.seeds)
            if batch >= degree and (apart := told_apart(program)) is not None:
                return self.apply(apart)
            raise ParallelizeError(_explain(degree, batch))
        if best.size < degree and not self.shared:
            raise ParallelizeError(_explain(degree, best.size))
        for node in values:
            if best.work * min(degree, best.size) <= BALANCED * whole:
                break
            if node.meta[SPEC].shape[0] == best.size and not divides(best.attempt, node.name, 0):
                more = self._tried(trial, node, best.seeds)
                best = more if more is not None and more.ticks <= FURTHER * best.ticks else best
        return _behind_cuts(best.attempt.program().replace(mesh=self.mesh))

    def _tried(self, trial: Propagation, node: fx.Node, seeds: Seeds) -> _Choice | None:
        """The choice to cut this value too, unless that divides queries or keys other than between samples."""
        shape = node.meta[SPEC].shape
        layout = Layout.whole(len(shape)).with_dims({0: self._samples(shape[0])})
        seeds = {**seeds, node.name: (layout,)}
        result = trial.attempt(seeds)
        if BATCH in result.key_gather_dims() or len({BATCH in result.attention_mesh_dims(p) for p in PARTS}) > 1:
            return None
        return self._choice(result, shape[0], seeds)

    def _choice(self, result: Assignment, size: int, seeds: Seeds) -> _Choice:
        """Others are compared by what the slowest rank takes, the whole by FLOPs: what is legal is so everywhere."""
        return _Choice(max(result.flops()), max(result.work(self.machine)), size, seeds, result)

    def _samples(self, size: int) -> Partition:
        """Those of each rank; each has one, if there is any."""
        degree = self.mesh.size((BATCH,))
        if not self.shared or size >= degree or not size:
            return self.mesh.divide(size, (BATCH,))
        places = (self.mesh.index(rank, (BATCH,)) * size // degree for rank in range(self.mesh.world_size))
        return Partition(size, tuple(Indices.range(place, place + 1) for place in places))

    def _packed(self, trial: Propagation, program: Program) -> _Choice | None:
        """Samples that follow each other in one sequence: cut where it is joined or taken apart, such that no query
        then misses a key."""
        best: _Choice | None = None
        for node, dim in _sequences(program):
            if best is not None and divides(best.attempt, node.name, dim):
                continue
            shape = node.meta[SPEC].shape
            for partition in self._between(shape[dim], borders_of(program, shape[dim])):
                layout = Layout.whole(len(shape)).with_dims({dim: partition})
                seeds = {**(best.seeds if best else {}), node.name: (layout,)}
                result = trial.attempt(seeds)
                choice = self._choice(result, shape[dim], seeds)
                if BATCH not in result.key_gather_dims() and (best is None or choice.ticks < best.ticks):
                    best = choice
        return best

    def _between(self, size: int, borders: Collection[int]) -> list[Partition]:
        """Partitions at some of these borders, the most even first."""
        degree, ranks = self.mesh.size((BATCH,)), range(self.mesh.world_size)
        found = [
            [Indices.range(start, end) for start, end in itertools.pairwise((0, *chosen, size))]
            for chosen in itertools.combinations(sorted(borders), degree - 1)
        ]
        found.sort(key=lambda pieces: max(piece.size for piece in pieces))
        return [
            Partition(size, tuple(pieces[self.mesh.index(rank, (BATCH,))] for rank in ranks))
            for pieces in found[:TRIALS]
        ]


def _sequences(program: Program) -> Iterator[tuple[fx.Node, int]]:
    """What the outer graph joins, the last first, and the token streams."""
    for node in reversed(program.graph.nodes):
        if getattr(node.target, "overloadpacket", None) in JOINS and node.meta[SPEC].dtype.is_floating_point:
            yield node, joined_dim(node)
    values = {node.name: node for node in program.graph.nodes}
    yield from ((values[axis.value], axis.dim) for axis in program.tokens if not axis.is_context)


def _with_tokens(program: Program, seeds: Seeds) -> Program:
    """What was cut between samples are the first token streams, to be cut further where they are cut."""
    values = {node.name: node for node in program.graph.nodes}
    streams = []
    for name, (layout,) in seeds.items():
        cut = next((user for user in values[name].users if user.meta.get(LAYOUT) == layout), values[name])
        dim = next(d for d, partition in enumerate(layout.dims) if partition is not None)
        streams.append(TokenAxis(cut.name, dim, cut.meta[SPEC].shape[dim]))
    rest = (axis for axis in program.tokens if axis.value not in seeds)
    return program.replace(tokens=(*streams, *rest))


def _behind_cuts(program: Program) -> Program:
    """Token streams that begin with an input whose samples are cut begin behind that, to be cut further there."""
    values = {node.name: node for node in program.graph.nodes}
    cuts = {
        axis.value: next((user.name for user in values[axis.value].users if user.target is ops.shard), axis.value)
        for axis in program.tokens
    }
    return program.replace(tokens=tuple(replace(axis, value=cuts[axis.value]) for axis in program.tokens))


def batched_inputs(program: Program) -> list[fx.Node]:
    """The inputs that may have a sample in each row, integers too."""
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.meta[SPEC].shape]


def check_batch(program: Program, degree: int) -> None:
    """Raise `ParallelizeError` if no input has so many samples, before anything is listed for each rank.

    Tables and ids may be longer than the batch, so a degree that is large is tried with two ranks first.
    """
    sizes = [node.meta[SPEC].shape[0] for node in batched_inputs(program)]
    if LARGE < degree <= max(1, *sizes):
        try:
            halves = SplitBatch(Mesh.of(**{BATCH: 2})).apply(program)
        except ParallelizeError:
            raise ParallelizeError(_explain(degree, 1)) from None
        sizes = [
            node.meta[SPEC].shape[0] for node in batched_inputs(halves) if node.meta[LAYOUT].dims[0] is not None
        ] or [degree]
    if degree > max(1, *sizes):
        raise ParallelizeError(_explain(degree, min(sizes, default=1)))


def _explain(degree: int, batch: int) -> str:
    if batch >= degree:
        return (
            f"cfg={degree} divides the batch, but cutting the first dimension of no input divides the work, nor does a "
            f"cut between {degree} samples packed into one sequence; use cfg=1 with ulysses or ring"
        )
    packed = "" if batch > 1 else " (with ulysses or ring, if samples are packed into one sequence)"
    return (
        f"cfg={degree} divides the batch, but the example has a batch of {batch}: "
        f"give at least {degree} samples (conditional and unconditional), or use cfg={max(batch, 1)}{packed}"
    )

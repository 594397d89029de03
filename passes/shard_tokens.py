"""`shard-tokens`: divide the token streams over the mesh dims `ring` and `ulysses`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, Seeding, TokenAxis
from xdit_ir.passes.find_tokens import divides
from xdit_ir.passes.undivided import undivided_values
from xdit_ir.sharding.assignment import Assignment
from xdit_ir.sharding.cost import program_flops
from xdit_ir.sharding.layout_graph import Layouts
from xdit_ir.sharding.machine import Machine, program_work
from xdit_ir.sharding.propagate import Propagation, Seeds

# The part of the work that must be left for it to be worth to exchange keys that every rank could make by itself.
WORTH = 0.95
# How much longer a stream may take that is the best by FLOPs: prices of kernels are not better known.
CLOSE = 0.02
# The work of all ranks, if each had that of the slowest, that is not worth a look for further streams.
BALANCED = 10_100
# And more than that is worth a look behind what had to be whole.
UNEVEN = 11_000


@dataclass(frozen=True, order=True)
class ShardPrice:
    """What a partition costs: the slowest rank's time of work (in 1/10000 of one device's), then seconds of exchanges.
    In this order, as degrees are given for the work to be divided."""

    work: int
    exchanges: float


@dataclass(frozen=True)
class _Choice:
    price: ShardPrice
    attempt: Assignment
    seeds: Seeds


@dataclass(frozen=True)
class ShardTokens:
    """Propose partitions of the best token stream, propagate each, keep the cheapest, add further streams greedily.

    Proposals: contiguous and even; even within the segments into which the model cuts the stream; in whole units of
    a view's inner factor (rows, frames); even within each such unit (places of every frame). Where windows move along
    what is divided, also two dims (rows and columns) over a mesh dim each: rows over all ranks have two borders of the
    whole width, parts on a grid of ranks have shorter ones. Streams that reach no query are gathered before the blocks,
    or their keys are exchanged, where that saves enough work, or are divided instead of those that do, where these
    leave much to the slowest rank; and what comes behind a value that had to be whole is divided again. What is chosen
    is noted as seeds, of which `propagate-layouts` makes layouts. Where nothing can be divided every rank computes all,
    and the report says so.
    """

    name: ClassVar[str] = "shard-tokens"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.SEEDS})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.LAYOUTS, Fact.ATTENTION, Fact.RUNNABLE})

    mesh: Mesh
    machine: Machine = field(default_factory=Machine)

    def apply(self, program: Program) -> Program:
        """The program with what to divide noted as seeds, unless that has been decided."""
        if program.seeding is not None:
            return program
        best = self._best(program) if self.mesh.size(SEQUENCE) > 1 else None
        return program.replace(seeding=Seeding(self.mesh, best.seeds if best is not None else {}))

    def _best(self, program: Program) -> _Choice | None:
        trial, degree = Propagation(program, self.mesh), self.mesh.size(SEQUENCE)
        best: _Choice | None = None
        for axis in self._by_time(program, trial):
            if axis.is_context and best is not None and best.price.work * degree <= BALANCED:
                break
            if best is not None and divides(best.attempt, axis.value, axis.dim):
                continue
            instead = axis.is_context and best is not None and best.price.work * degree > UNEVEN
            for layouts, others in itertools.product(self._proposals(program, axis), (True, False)[: 1 + instead]):
                seeds = {**(best.seeds if best and others else {}), axis.value: layouts}
                choice = self._priced(program, trial.attempt(seeds), seeds)
                if best is None and axis.is_context:  # nothing reaches a query: only where that saves work
                    accepted = choice.price.work <= WORTH * self._priced(program, trial.attempt(), {}).price.work
                else:
                    accepted = best is None or (choice.price < best.price and self._is_worth(choice, best, axis))
                best = choice if accepted else best
        return self._divided_again(program, trial, best and self._in_two_dims(program, trial, best))

    def _by_time(self, program: Program, trial: Propagation) -> Sequence[TokenAxis]:
        """The streams, of those that reach a query first the one that leaves the slowest rank the least time: by FLOPs
        they are told so already, which holds where times are nearly the same. So ranks run one code for all sizes,
        where at some of them it is cheaper, by a thousandth, to leave all text with one of them."""
        queries = [axis for axis in program.tokens if not axis.is_context]
        if self.machine.kernels is None or len(queries) < 2:
            return program.tokens
        first = {axis: {axis.value: next(self._proposals(program, axis))} for axis in queries}
        times = {axis: max(trial.attempt(seeds).work(self.machine)) for axis, seeds in first.items()}
        near = (1 + CLOSE) * min(times.values())
        queries.sort(key=lambda axis: times[axis] if times[axis] > near else 0)
        return [*queries, *(axis for axis in program.tokens if axis.is_context)]

    def _in_two_dims(self, program: Program, trial: Propagation, best: _Choice) -> _Choice:
        """Where windows reach over borders: two dims of a value, each over mesh dims of its own, if that costs less."""
        names = [name for name in SEQUENCE if self.mesh.size((name,)) > 1]
        splits = [one for count in range(1, len(names)) for one in itertools.combinations(names, count)]
        if not splits or not best.attempt.divides_space():
            return best
        free = [axis for axis in program.tokens if axis.value in best.seeds and not _cut(program, axis)]
        pairs = (pair for pair in itertools.combinations(free, 2) if pair[0].value == pair[1].value)
        for (one, other), mine in itertools.product(pairs, splits):
            rest = [name for name in names if name not in mine]
            first, second = self.mesh.divide(one.size, mine), self.mesh.divide(other.size, rest)
            layout = _layout(program, one).with_dims({one.dim: first, other.dim: second})
            seeds = {**best.seeds, one.value: (layout,)}
            choice = self._priced(program, trial.attempt(seeds), seeds)
            best = choice if choice.price < best.price else best
        return best

    def _divided_again(self, program: Program, trial: Propagation, best: _Choice | None) -> _Choice | None:
        """Seeds, too, behind values that had to be whole, as long as that saves much work."""
        total, degree = program_flops(program, None)[0], self.mesh.size(SEQUENCE)
        now = best or self._priced(program, trial.attempt(), {})
        while now.price.work * degree > UNEVEN:
            places = [node for node in undivided_values(now.attempt, total) if node.name not in now.seeds]
            seeds = ({**now.seeds, node.name: (layout,)} for node in places for layout in self._cuts(node))
            choices = (self._priced(program, trial.attempt(one), one) for one in seeds)
            found = min(choices, key=lambda choice: choice.price, default=None)
            if found is None or found.price.work > WORTH * now.price.work:
                break
            best = now = found
        return best

    def _cuts(self, node: fx.Node) -> list[Layout]:
        """Every dim of a value divided evenly, where there is something for every rank."""
        shape, degree = node.meta[SPEC].shape, self.mesh.size(SEQUENCE)
        have = node.meta.get(LAYOUT) or Layout.whole(len(shape))
        free = (dim for dim, size in enumerate(shape) if size >= degree and have.dims[dim] is None)
        return [have.with_dims({dim: self.mesh.divide(shape[dim], SEQUENCE)}) for dim in free]

    def _is_worth(self, choice: _Choice, best: _Choice, axis: TokenAxis) -> bool:
        """Each further stream costs communication, keys that are exchanged in every block most of all."""
        exchanged = axis.is_context and len(choice.seeds[axis.value]) == 1
        return choice.price.work <= (WORTH if exchanged else 1) * best.price.work

    def _priced(self, program: Program, tried: Assignment, seeds: Seeds) -> _Choice:
        slowest, total = max(tried.work(self.machine)), max(program_work(program, self.machine), 1)
        price = ShardPrice(round(10_000 * slowest / total), tried.exchange_seconds(self.machine))
        return _Choice(price, tried, seeds)

    def _proposals(self, program: Program, axis: TokenAxis) -> Iterator[Layouts]:
        have = _layout(program, axis)
        cut = have.dims[axis.dim]
        if cut is not None:
            yield (have.with_dims({axis.dim: self.mesh.refine(cut, SEQUENCE)}),)
            return
        even = self.mesh.divide(axis.size, SEQUENCE)
        if axis.is_context:
            divided = have.with_dims({axis.dim: even})
            yield from ((divided, have), (divided,))
            return
        finer = itertools.product((1, *axis.units), ((), *axis.segments))
        inside = ((1, (unit,) * (axis.size // unit)) for unit in axis.units)
        partitions = (self.mesh.divide(axis.size, SEQUENCE, unit, segments) for unit, segments in (*finer, *inside))
        yield from ((have.with_dims({axis.dim: one}),) for one in dict.fromkeys((even, *partitions)))


def _cut(program: Program, axis: TokenAxis) -> bool:
    return _layout(program, axis).dims[axis.dim] is not None


def _layout(program: Program, axis: TokenAxis) -> Layout:
    node = next(node for node in program.graph.nodes if node.name == axis.value)
    layout: Layout = node.meta.get(LAYOUT) or Layout.whole(len(node.meta[SPEC].shape))
    return layout

"""`plan`: works out what every way to use some GPUs takes, and orders them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from xdit_ir.api import TracedProgram, trace
from xdit_ir.capture.inputs import Example
from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, FEATURES, TIME
from xdit_ir.passes.cast_kv_cache import kv_cache_dtype as stored_dtype
from xdit_ir.passes.keeping import Keeping
from xdit_ir.planning.candidate import WHOLE, Candidate, slower
from xdit_ir.planning.candidates import Rough, attentions
from xdit_ir.planning.estimate import Estimate, estimate
from xdit_ir.planning.hardware import GIB, Hardware, hardware_of
from xdit_ir.planning.legality import PAIR, Legality
from xdit_ir.planning.options import Options, check_counts, check_options, gib_of
from xdit_ir.planning.plan import Plan, model_name, weights_key
from xdit_ir.reflection.methods import Module
from xdit_ir.sharding.machine import Machine

# So many candidates are worked out in full: those that are roughly the fastest.
FULL = 3
# The part of a GPU's memory that a plan uses: what else there is needs some.
USABLE = 0.92


def plan(
    model: Module,
    example: Example,
    *,
    gpus: int = 8,
    machine: str | Machine | Hardware | None = None,
    memory: float | str | None = None,
    exact: bool = True,
    flash: bool = False,
    shard_weights: bool | None = None,
    stream_weights: bool | int | str | None = None,
    data: int | None = None,
    kv_cache_dtype: str = "auto",
    **given: int,
) -> Plan:
    """All ways to use `gpus` GPUs for `model`, with time and memory worked out from sizes; nothing is run.

    Args:
        model, example: as for `trace`; on the meta device nothing of its size is allocated.
        gpus: their number; one process each.
        machine: the name of one that is kept (see `xdit_ir.planning.hardware.names`) or was measured here by
            `xdit-ir calibrate`, the path of such a file, or plain speeds; default: that of the GPUs here, or "h100".
        memory: GiB that a rank may use, or a text with a unit, such as "80GB"; default: nearly all that the machine's
            GPU has.
        exact: only ways that compute what one GPU does; else also PipeFusion, whose later steps read older values.
        flash: attention by FlashAttention, installed where the model will run, instead of PyTorch's.
        shard_weights: as for `parallelize`, where there are several ranks; default: where whole weights do not fit.
        stream_weights: as for `parallelize`; default: where nothing else fits, with as many weights on the GPU as do.
        data: so many replicas, over which the GPUs are shared out; default: one, and what several would do is told.
        kv_cache_dtype: as for `parallelize`, of the ways that have stages.
        given: degrees that are to be kept.

    Raises:
        ParallelizeError: there is no such machine or degree, or what is given does not divide `gpus`.
        TraceError: the model cannot be captured.
    """
    hardware = hardware_of(machine)
    check_counts(gpus, given, data)
    check_options(exact=exact, flash=flash, shard_weights=shard_weights)
    streamed = (
        None if stream_weights is None else Keeping.of(stream=stream_weights).options.get("stream_weights", False)
    )
    stored_dtype(kv_cache_dtype)  # a wrong one is told before the model is traced
    how = Options(gib_of(memory), exact, flash, shard_weights, streamed, data=data, kv_cache_dtype=kv_cache_dtype)
    how.degree_sets(gpus // (data or 1), given)  # wrong ones are told before the model is traced
    traced = TracedProgram(trace(model, example).ir, familiar=True)  # `port` verifies what it makes
    return plan_traced(traced, model, gpus, hardware, given, how)


def plan_traced(
    traced: TracedProgram,
    model: Module,
    gpus: int,
    hardware: Hardware,
    given: Mapping[str, int],
    how: Options,
) -> Plan:
    """`plan` for a model that is traced already."""
    limit = hardware.memory / GIB * USABLE if how.memory is None else how.memory
    planner = Planner(traced, hardware, limit, how, pairs=given.get(BATCH) == PAIR)
    named, weights = hardware.name or str(hardware), weights_key(model)
    found = planner.candidates(gpus, given)
    return Plan(model_name(model), weights, gpus, named, limit, found, hardware.prices, how.kv_cache_dtype)


@dataclass(frozen=True)
class Planner:
    """For one traced model and machine; `memory`: GiB that a rank may use. `pairs`: where the batch cannot be divided,
    two halves of `cfg` run two calls, as `port` does."""

    traced: TracedProgram
    hardware: Hardware
    memory: float
    how: Options
    pairs: bool = False

    def candidates(self, gpus: int, given: Mapping[str, int]) -> tuple[Candidate, ...]:
        """The best first, then those that fit by time, those that do not, more replicas, and what is illegal."""
        ways = self._ways(gpus // (self.how.data or 1), given)
        found = self._considered(ways)
        off = self._off(found)
        found = self._scaled(found, off)
        if self.how.stream_weights is None and all(map(self._excess, found)):
            found += self._streamed(ways)
        ordered = self._ordered(found)
        if self.how.data is None and not ordered[0].why:
            legal = [one for one in ordered if one.legal]
            replicas = [
                one for count in range(2, gpus + 1) for one in self._replicas(count, gpus, given, ordered[0], off)
            ]
            ordered = (*legal, *replicas, *(one for one in ordered if not one.legal))
        return ordered

    @cached_property
    def _alone(self) -> Estimate:
        return self._estimate(Candidate(Degrees(), ""))

    @cached_property
    def _legality(self) -> Legality:
        return Legality(self.traced.analysed, self.pairs)

    @cached_property
    def _rough(self) -> Rough:
        return Rough(self._alone, attentions(self.traced.analysed), self.hardware)

    def _ways(self, gpus: int, given: Mapping[str, int]) -> list[Candidate]:
        """What there is to consider, roughly the fastest first; weights in parts behind whole ones."""
        sharded = self.how.shard_weights
        found = []
        for degrees in self.how.degree_sets(gpus, given):
            parted = degrees.mesh.size(degrees.mesh.dims_of_a_call(paired=False)) > 1
            choices = (False, True) if sharded is None and parted else (bool(sharded) and parted,)
            between = self.hardware.between(degrees.mesh)
            way = Candidate(degrees, "", data=self.how.data or 1, between=between)
            way = replace(way, stream_weights=self.how.stream_weights or False)
            found += [replace(way, shard_weights=one) for one in choices]
        return sorted(found, key=self._guessed)

    def _guessed(self, way: Candidate) -> float:
        return self._rough.ms(way.degrees, shard_weights=way.shard_weights)

    def _considered(self, ways: list[Candidate]) -> list[Candidate]:
        """Those that seem the fastest in full, until `FULL` of them fit; the others roughly."""
        refusals = self._legality.refusals([way.degrees for way in ways])
        found: dict[tuple[Degrees, bool], Candidate] = {}
        fitting = 0
        for way in ways:
            whole = found.get((way.degrees, False)) if way.shard_weights else None
            if refusal := refusals[way.degrees]:
                if whole is not None:
                    continue
                one = replace(way, why=refusal)
            elif whole is not None and not self._excess(whole):
                one = replace(self._guess(way), why=WHOLE)
            elif fitting >= FULL or self._weights(way) > self.memory:
                one = self._guess(way)
            else:
                one = self._full(way)
                fitting += not self._excess(one)
            found[way.degrees, way.shard_weights] = one
        return list(found.values())

    def _off(self, found: Sequence[Candidate]) -> float:
        """How many times what their rough figures say those take that were worked out in full, at least."""
        full = ((one.ms, self._guessed(one)) for one in found if one.parts is not None and one.ms)
        return min((ms / rough for ms, rough in full if rough), default=1.0)

    def _scaled(self, found: Sequence[Candidate], off: float) -> list[Candidate]:
        """With rough figures that are comparable with what was worked out in full, and none under the best of that:
        those of which whole weights were worked out take no less than these, and all others were roughly slower."""
        whole = {one.degrees: one.ms or 0.0 for one in found if one.parts is not None and not one.shard_weights}
        return [
            one
            if one.ms is None or one.parts is not None
            else replace(one, ms=max(one.ms * off, whole.get(one.degrees, 0.0)))
            for one in found
        ]

    def _streamed(self, ways: Sequence[Candidate]) -> list[Candidate]:
        """Of what is roughly the fastest, weights with the host, and on the GPU as many of them as there is room for
        beside all else. It takes no less than weights in parts, so it is for where those do not fit."""
        refusals = self._legality.refusals([way.degrees for way in ways])
        legal = (way for way in ways if not refusals[way.degrees] and way.degrees.mesh.degrees[TIME] == 1)
        found = []
        for way in itertools.islice((one for one in legal if not one.shard_weights), FULL):
            one = self._full(replace(way, stream_weights=True))
            room = int((self.memory - max(one.gib, default=self.memory)) * GIB)
            found.append(self._full(replace(way, stream_weights=room)) if room > 0 else one)
        return found

    def _estimate(self, way: Candidate) -> Estimate:
        degrees = way.degrees
        pairs = self.pairs and degrees.mesh.degrees[BATCH] == PAIR and bool(self._legality.of_batch(PAIR))
        stages: dict[str, Any] = {"kv_cache_dtype": self.how.kv_cache_dtype} if degrees.mesh.degrees[TIME] > 1 else {}
        parallel = self.traced.parallelize(
            **degrees.as_dict(),
            **stages,
            machine=self.hardware.prices,
            pair_calls=pairs,
            shard_weights=way.shard_weights,
            stream_weights=way.stream_weights,
        )
        return estimate(parallel, self.hardware, flash=self.how.flash)

    def _full(self, way: Candidate) -> Candidate:
        try:
            return _with(way, self._estimate(way))
        except ParallelizeError as error:
            return replace(way, why=str(error))

    def _weights(self, way: Candidate) -> float:
        """GiB of weights that a GPU has at least."""
        if way.stream_weights:
            return 0.0
        mesh = way.degrees.mesh
        return self._alone.weights[0] / (mesh.world_size if way.shard_weights else mesh.size((TIME, *FEATURES)))

    def _guess(self, way: Candidate) -> Candidate:
        weights = (self._weights(way),) * way.degrees.ranks
        return replace(way, ms=self._guessed(way), gib=weights, weights=weights)

    def _replicas(
        self, count: int, gpus: int, given: Mapping[str, int], best: Candidate, off: float
    ) -> Iterator[Candidate]:
        """So many replicas of what is roughly the fastest for the rest of the GPUs; with what it would be good for."""
        each, more = divmod(gpus, count)
        if more or each % math.prod(given.values()):
            return
        ways = self._ways(each, given)
        refusals = self._legality.refusals([way.degrees for way in ways])
        fitting = (way for way in ways if not refusals[way.degrees] and self._weights(way) <= self.memory)
        if (way := next(fitting, None)) is None:
            return
        alone = way.degrees.ranks == 1
        [one] = [_with(way, self._alone)] if alone else self._scaled([self._guess(way)], off)
        one = replace(one, data=count)
        if best.ms and one.ms and not self._excess(one):
            longer, more_steps = one.ms / best.ms, one.a_second / best.a_second
            why = f"{longer:.2f} times as long, {more_steps:.2f} times as many steps a second"
            yield replace(one, why=f"{why}: for as many requests at a time, with data={count}")

    def _ordered(self, found: list[Candidate]) -> tuple[Candidate, ...]:
        ordered = sorted(found, key=self._place)
        first, *others = ordered
        if self._excess(first):
            return tuple(self._explained(one, None) for one in ordered)
        return (first, *(self._explained(one, first) for one in others))

    def _place(self, one: Candidate) -> tuple[bool, bool, bool, float]:
        return not one.legal, bool(self._excess(one)), one.parts is None, one.ms or 0.0

    def _excess(self, one: Candidate) -> str:
        """Why it does not fit, or is illegal; empty if it fits."""
        if one.why:
            return one.why
        most = max(one.gib, default=0.0)
        if most <= self.memory:
            return ""
        least = "" if one.parts else "at least "
        return (
            f"needs {least}{most:.1f} GiB a GPU, of which {max(one.weights):.1f} weights; {self.memory:.1f} may be used"
        )

    def _explained(self, one: Candidate, best: Candidate | None) -> Candidate:
        why = self._excess(one)
        if not why and best is not None and one.ms is not None and best.ms is not None:
            why = slower(one, best, one.ms / best.ms)
        return replace(one, why=why)


def _with(way: Candidate, found: Estimate) -> Candidate:
    return replace(way, ms=found.ms, parts=found.parts, gib=found.gib, weights=found.weights)

"""`plan`: works out what every way to use some GPUs takes, and orders them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from xdit_ir.api import Example, TracedProgram, trace
from xdit_ir.capture.methods import Module
from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import BATCH, TIME, Mesh
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.keeping import ALL_HERE, Keeping
from xdit_ir.passes.split_batch import SplitBatch
from xdit_ir.planning.candidates import Rough, attentions, batch_degrees, degree_sets
from xdit_ir.planning.estimate import Estimate, Parts, estimate
from xdit_ir.planning.hardware import GIB, Hardware, hardware_of
from xdit_ir.planning.plan import Candidate, Plan, model_name, weights_key
from xdit_ir.sharding.machine import Machine

# So many candidates are worked out in full: those that are roughly the fastest.
FULL = 3
# The part of a GPU's memory that a plan uses: what else there is needs some.
USABLE = 0.92
# Calls that are run at a time where halves of `cfg` run different ones.
PAIR = 2


def plan(
    model: Module,
    example: Example,
    *,
    gpus: int = 8,
    machine: str | Machine | Hardware = "h100",
    memory: float | None = None,
    exact: bool = True,
    flash: bool = False,
    shard_weights: bool = False,
    stream_weights: bool = False,
    **given: int,
) -> Plan:
    """All ways to use `gpus` GPUs for `model`, with time and memory worked out from sizes; nothing is run.

    Args:
        model, example: as for `trace`; on the meta device nothing of its size is allocated.
        gpus: their number; one process each.
        machine: the name of one that is kept (see `xdit_ir.planning.hardware.names`), or plain speeds.
        memory: GiB that a rank may use; default: nearly all that the machine's GPU has.
        exact: only ways that compute what one GPU does; else also PipeFusion, whose later steps read older values.
        flash: attention by FlashAttention, installed where the model will run, instead of PyTorch's.
        shard_weights, stream_weights: as for `parallelize`, the former where there are several ranks.
        given: degrees that are to be kept.

    Raises:
        ParallelizeError: there is no such machine or degree, or what is given does not divide `gpus`.
        TraceError: the model cannot be captured.
    """
    hardware = hardware_of(machine)
    _check(gpus, given)
    degree_sets(gpus, given, exact=exact)  # wrong ones are told before the model is traced
    traced = TracedProgram(trace(model, example).ir, familiar=True)  # `port` verifies what it makes
    how = Options(memory, exact, flash, Keeping(shard_weights and gpus > 1, stream_weights))
    return plan_traced(traced, model, gpus, hardware, given, how)


@dataclass(frozen=True)
class Options:
    """Those of `plan`, for what they mean."""

    memory: float | None = None
    exact: bool = True
    flash: bool = False
    keeping: Keeping = ALL_HERE


def plan_traced(
    traced: TracedProgram,
    model: Module,
    gpus: int,
    hardware: Hardware,
    given: Mapping[str, int],
    how: Options,
) -> Plan:
    """`plan` for a model that is traced already."""
    sets = degree_sets(gpus, given, exact=how.exact)
    limit = hardware.memory / GIB * USABLE if how.memory is None else how.memory
    planner = Planner(traced, hardware, limit, how, pairs=given.get(BATCH) == PAIR)
    named, weights = hardware.name or str(hardware), weights_key(model)
    found = planner.candidates(sets)
    return Plan(model_name(model), weights, gpus, named, limit, found, how.keeping.shard, how.keeping.stream)


def _check(gpus: int, given: Mapping[str, int]) -> None:
    Mesh.of(**given)
    if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
        raise ParallelizeError(f"gpus={gpus!r}: expected a positive number, such as 8")


@dataclass(frozen=True)
class Planner:
    """For one traced model and machine; `memory`: GiB that a rank may use. `pairs`: where the batch cannot be divided,
    two halves of `cfg` run two calls, as `port` does."""

    traced: TracedProgram
    hardware: Hardware
    memory: float
    how: Options
    pairs: bool = False

    def candidates(self, sets: list[Degrees]) -> tuple[Candidate, ...]:
        """The best first, then those that fit by time, those that do not, and what is illegal."""
        alone = self._estimate(Degrees())
        rough = Rough(alone, attentions(self.traced.analysed), self.hardware)
        illegal: dict[int, str] = {}
        for size in batch_degrees(sets):
            if not any(illegal.values()):
                illegal[size] = self._batch_refusal(size)
        sets = [one for one in sets if one.mesh.degrees[BATCH] in (1, *illegal)]  # larger ones are illegal likewise
        found: list[Candidate] = []
        worked = 0
        for degrees in sorted(sets, key=rough.ms):
            size = degrees.mesh.degrees[BATCH]
            refusal = "" if self.pairs and size == PAIR else illegal.get(size, "")
            known = refusal or worked >= FULL or self._weights(alone, degrees) > self.memory
            one = self._guess(degrees, alone, rough, refusal) if known else self._full(degrees)
            worked += one.parts is not None
            found.append(one)
        return self._ordered(found)

    def _estimate(self, degrees: Degrees) -> Estimate:
        pairs = self.pairs and degrees.mesh.degrees[BATCH] == PAIR and bool(self._batch_refusal(PAIR))
        parallel = self.traced.parallelize(
            **degrees.as_dict(),
            machine=self.hardware.machine,
            pair_calls=pairs,
            shard_weights=self.how.keeping.shard and degrees.ranks > 1,
            stream_weights=self.how.keeping.stream,
        )
        return estimate(parallel, self.hardware, flash=self.how.flash)

    def _batch_refusal(self, size: int) -> str:
        """Why the batch cannot be divided so; empty if it can."""
        try:
            run_passes(self.traced.analysed, [SplitBatch(Mesh.of(**{BATCH: size}))], familiar=True)
        except ParallelizeError as error:
            return str(error)
        return ""

    def _full(self, degrees: Degrees) -> Candidate:
        try:
            found = self._estimate(degrees)
        except ParallelizeError as error:
            return Candidate(degrees, str(error))
        return Candidate(degrees, "", found.ms, found.parts, found.gib, found.weights)

    def _weights(self, alone: Estimate, degrees: Degrees) -> float:
        """GiB of weights that a GPU has at least."""
        if self.how.keeping.stream:
            return 0.0
        return alone.weights[0] / (degrees.ranks if self.how.keeping.shard else degrees.mesh.degrees[TIME])

    def _guess(self, degrees: Degrees, alone: Estimate, rough: Rough, refusal: str) -> Candidate:
        if refusal:
            return Candidate(degrees, refusal)
        weights = (self._weights(alone, degrees),) * degrees.ranks
        return Candidate(degrees, "", rough.ms(degrees), None, weights, weights)

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
            why = _slower(one, best, one.ms / best.ms)
        return dataclasses.replace(one, why=why)


def _slower(one: Candidate, best: Candidate, times: float) -> str:
    """Why a candidate is behind the best, by the part that it loses most in."""
    if one.parts is None or best.parts is None:
        return f"about {times:.2f} times as long by sizes alone; the {FULL} that seemed best were worked out"
    names = [field.name for field in dataclasses.fields(Parts)]
    ours, theirs = dataclasses.astuple(one.parts), dataclasses.astuple(best.parts)
    lost, name = max((a - b, name) for a, b, name in zip(ours, theirs, names, strict=True))
    return f"{times:.2f} times as long; {name} {lost:+.1f} ms"

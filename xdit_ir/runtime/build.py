"""Runners of the programs of one model: made by all ranks together, or by none."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

from xdit_ir.caching.cut import CachedProgram
from xdit_ir.caching.rule import CacheRule
from xdit_ir.emission.codegen import communications, state_names
from xdit_ir.emission.context import RankContext
from xdit_ir.errors import MismatchError
from xdit_ir.ir.collective_ops import AllGather
from xdit_ir.ir.program import Program, Stored
from xdit_ir.ir.wrappers import PLAIN
from xdit_ir.parallel import Parallel
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.pipelined.pipe_runner import PipelineRunner, check_pipeline
from xdit_ir.pipelined.schedule import verify_schedule
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.runtime.agreement import Agreement
from xdit_ir.runtime.cached import CachedRunner
from xdit_ir.runtime.denoising import Denoising
from xdit_ir.runtime.pairing import PairedRunner, Pairing
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.runtime.runner import Runner
from xdit_ir.sharding.branches import draws
from xdit_ir.transport.handshake import (
    TRACE,
    Facts,
    agree,
    agree_contents,
    contents_hash,
    digest,
    fact,
    failure_text,
    is_dense,
)

_DRAWS = (
    "cfg runs calls one by one, on all ranks: forward draws random numbers ({}), which ranks that run one call each "
    "would draw in another order; pass the noise to forward, or use cfg=1 and more ulysses or ring"
)
AnyParallel = TypeVar("AnyParallel", bound=Parallel)


@dataclass(frozen=True, eq=False)
class _Part:
    """What one rank knows of its part of a program without the others: the names of the weights it uses, how some are
    stored in parts, the programs whose process groups all make together, and how it is made a runner, which is
    collective."""

    weights: Sequence[str]
    stored: Mapping[str, Stored]
    exchanging: Iterable[Program]
    runner: Callable[[Facts], RankRunner]


class RunnerFactory:
    """Makes runners, and has what those of one model share: the queue of a pipeline, calls that wait for another,
    and what ranks agree on.

    `pairs`: programs of which parts of `cfg` run different calls pair them. `branch`: who knows to which branch of
    guidance a call of the next program belongs, for its step cache; None: that follows from its inputs.
    """

    branch: Callable[[], tuple[str, object]] | None = None

    def __init__(self, context: RankContext, *, pairs: bool = False) -> None:
        self.context, self.pairs = context, pairs
        self.agreement, self.denoising = Agreement(context.communicator, context.execution.compile), Denoising()

    @cached_property
    def queue(self) -> StepQueue:
        """What passes through stages. Collective at its first use."""
        return StepQueue(self.context.communicator)

    @cached_property
    def pairing(self) -> Pairing:
        """The calls that are paired. Collective at its first use."""
        return Pairing(self.context.communicator)

    def finish(self) -> None:
        """Run the calls that wait for others, before weights change."""
        if "pairing" in vars(self):
            self.pairing.finish()

    def build(self, make: Callable[[], AnyParallel]) -> tuple[AnyParallel, RankRunner]:
        """Make a parallel program and its runner; all ranks call it together.

        Raises:
            MismatchError: on all ranks, if `make` fails on some only, or not in the same way on all, or the programs of
                the ranks differ, or tensors that these hold (tables, attributes of the model). What is refused on all
                is raised as it is.
        """
        failure: Exception | None = None
        try:
            parallel = make()
            part = self._part(parallel)
            self.context.store.check(part.weights, parallel.ir.state, part.stored)
            facts = vote = program_facts(parallel)
        except Exception as error:
            failure, facts, vote = error, {TRACE: failure_text(error)}, {TRACE: type(error).__name__}
        try:
            agree(self.context.communicator, digest(vote), lambda: facts)
        except MismatchError as mismatch:
            raise mismatch from failure
        if failure is not None:
            raise self.context.communicator.agreed(failure)
        tables = {name: x for name, x in parallel.original.constants.items() if type(x) in PLAIN and is_dense(x)}
        agree_contents(self.context.communicator, tables)
        targets = [one for program in part.exchanging for one in communications(program) if len(one.group) > 1]
        for beside in (False, True):
            wanted = [one.mesh_dims for one in targets if isinstance(one, AllGather) == beside]
            self.context.communicator.prepare(wanted, mesh=parallel.mesh, beside=beside)
        return parallel, part.runner(facts)

    def _part(self, parallel: Parallel) -> _Part:
        if parallel.pipeline is not None:
            return self._stages(parallel.pipeline, apart=parallel.pair_calls)
        program = parallel.rank(self.context.rank)
        paired = parallel.pair_calls and self.pairs and not _draws(program)
        if parallel.cache is not None:
            return self._cached(program, parallel.cached_rank(self.context.rank), parallel.cache.rule, paired=paired)
        return self._whole(program, paired=paired)

    def _cached(self, program: Program, cached: CachedProgram, rule: CacheRule, *, paired: bool) -> _Part:
        def runner(facts: Facts) -> Runner:
            pairing = self.pairing if paired else None
            return CachedRunner(self.context, program, cached, rule, facts, self.denoising, pairing, self.branch)

        return _Part(state_names(program)[0], program.stored, [program], runner)

    def _whole(self, program: Program, *, paired: bool) -> _Part:
        def runner(facts: Facts) -> Runner:
            if paired and not program.signature.effects:  # what a call leaves in caches cannot be put off
                return PairedRunner(self.context, program, facts, self.pairing)
            return Runner(self.context, program, facts)

        return _Part(state_names(program)[0], program.stored, [program], runner)

    def _stages(self, pipeline: Pipeline, *, apart: bool) -> _Part:
        check_pipeline(pipeline.program, self.context.execution, self.context.device)
        verify_schedule(pipeline)
        tasks = RankTasks(pipeline, self.context.rank)
        everyone = itertools.product(range(pipeline.stages), range(pipeline.virtual.world_size))
        return _Part(
            pipeline.weights_of(self.context.rank),
            pipeline.stored_of(self.context.rank),
            (pipeline.part(stage, virtual).program for stage, virtual in everyone),
            lambda facts: PipelineRunner(self.context, tasks, self.queue, facts, apart=apart),
        )


def program_facts(parallel: Parallel) -> dict[str, str]:
    """What two ranks must have in common to run a program together."""
    signature = parallel.original.signature
    facts = {TRACE: "made"}
    facts |= {leaf.path: "a value" if leaf.spec is None else fact(leaf.spec) for leaf in signature.leaves}
    for guard in signature.guards:
        is_tensor = isinstance(guard.value, torch.Tensor)
        facts[guard.path] = f"contents {contents_hash(guard.value)}" if is_tensor else fact(guard.value)
    facts["the mesh"] = fact(parallel.mesh)
    if parallel.cache is not None:
        facts["the step cache"] = parallel.cache.rule.text
    facts["the program"] = hashlib.blake2b(parallel.text(bodies=True).encode(), digest_size=8).hexdigest()
    return facts


def _draws(program: Program) -> bool:
    """Whether a program draws random numbers, which all ranks have to draw in the order of calls; says so."""
    if where := draws(program):
        warnings.warn(_DRAWS.format(where), stacklevel=2)
    return bool(where)

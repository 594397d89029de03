"""The public objects: a traced program, and the program that it becomes on a mesh of ranks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_ir import capture
from xdit_ir.caching.cut import CachedProgram, cut_cached
from xdit_ir.caching.decision import CacheCount
from xdit_ir.caching.hooked import check_unhooked
from xdit_ir.caching.rule import CacheRule
from xdit_ir.capture.inputs import Example
from xdit_ir.emission.context import RunOptions
from xdit_ir.emission.execution import Execution
from xdit_ir.emission.loading import Loading
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.mesh import BATCH, Mesh, check_degree_names
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import Program, Stored
from xdit_ir.passes.align_samples import AlignSamples
from xdit_ir.passes.base import After, run_passes
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.divide import check_schedule, divide, make_pipeline, note_region
from xdit_ir.passes.find_tokens import FindTokens, Streams
from xdit_ir.passes.keeping import Keeping
from xdit_ir.passes.order import canonical_passes
from xdit_ir.passes.split_batch import Batch
from xdit_ir.passes.take_known import guard_places
from xdit_ir.passes.trim_padding import rows_to_trim
from xdit_ir.pipefusion.pipeline_program import Pipeline, pipeline_text
from xdit_ir.pipefusion.pipeline_report import pipeline_report
from xdit_ir.reflection.methods import Module, as_module
from xdit_ir.runtime.emitted import Emitted, emit
from xdit_ir.sharding.machine import H100, Machine, checked
from xdit_ir.sharding.report import Report, make_report
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.simulation.cached import CachedSimulation
from xdit_ir.simulation.examples import Run, model_device, run_examples
from xdit_ir.simulation.lockstep import RankObserver, run_ranks
from xdit_ir.simulation.rank_steps import RankSimulation
from xdit_ir.simulation.steps import PipelineSimulation
from xdit_ir.transport.replicas import checked_data


def trace(model: Module, example: Example, leaf: Sequence[str | type | nn.Module] = ()) -> TracedProgram:
    """Capture `model` for one input signature.

    Args:
        model: a module on any device, including meta, or a method of one (`vae.decode`), which then is meant by
            forward; it is not changed and nothing of its size is allocated.
        example: forward's arguments, a mapping of keyword arguments or a tuple of positional ones. Tensors give
            shapes and dtypes; contents matter only where the model reads them, and become guards.
        leaf: submodules, by path, class name, class or instance, that are called as they are instead of being
            captured. Those that cannot be captured, such as a mixture of experts, are found without being named.

    Raises:
        TraceError: the module cannot be captured; names the input or the source line at fault.
    """
    module = as_module(model)
    check_unhooked(module)
    return TracedProgram(capture.trace(module, example, leaf))


@dataclass(frozen=True, eq=False)
class TracedProgram:
    """A captured model; `str()` is its block-level text, `ir` the program itself.

    `familiar`: one that differs in sizes only was divided and verified after every pass; see `run_passes`. `stored`:
    how ranks store weights for an earlier program of the model. `streams`: those of that other program. `canonical`:
    the canonical form, where padding has been trimmed to multiples of `rows`.
    """

    ir: Program
    familiar: bool = False
    stored: Mapping[str, Stored] = field(default_factory=dict)
    streams: Streams | None = None
    rows: int = 0
    canonical: Program | None = None
    _trimmed: dict[int, TracedProgram] = field(default_factory=dict)

    def __str__(self) -> str:
        return program_text(self.ir)

    def text(self, *, bodies: bool = False) -> str:
        """The textual form; with `bodies`, every operator."""
        return program_text(self.ir, bodies=bodies)

    @cached_property
    def analysed(self) -> Program:
        """The canonical program with its token streams found: what every mesh starts from."""
        passes: list[Pass] = [] if self.canonical is not None else canonical_passes()
        return run_passes(self.canonical or self.ir, [*passes, FindTokens(self.streams)], familiar=self.familiar)

    def trimmed(self, rows: int) -> TracedProgram:
        """The same without padding that masks make idle, for inputs with as much of it in multiples of so many `rows`;
        see `trim-padding`."""
        if rows == self.rows:
            return self
        if rows not in self._trimmed:
            canonical = run_passes(self.ir, canonical_passes(rows))
            ir = self.ir.replace(signature=canonical.signature)
            self._trimmed[rows] = replace(self, ir=ir, rows=rows, canonical=canonical, _trimmed={})
        return self._trimmed[rows]

    @cached_property
    def _placed(self) -> TracedProgram:
        """The same for inputs that say alike where rows are, which patches follow."""
        guarded = guard_places(self.ir)
        if guarded is self.ir:
            return self
        placed = replace(self, ir=guarded, rows=0, canonical=None, _trimmed={})
        return placed.trimmed(self.rows) if self.rows else placed

    @cached_property
    def _aligned(self) -> Program:
        """The canonical program whose samples have the same rows at the same places, see `align-samples`."""
        align = AlignSamples()
        if align.apply(self.analysed) is self.analysed:
            return self.analysed
        return run_passes(self.analysed, [align, FindTokens()])

    def parallelize(
        self,
        cfg: int = 1,
        ulysses: int = 1,
        ring: int = 1,
        pipefusion: int = 1,
        tensor: int = 1,
        patches: int | None = None,
        warmup_steps: int = 1,
        stages: Sequence[int] | None = None,
        kv_cache_dtype: str = "auto",
        pair_calls: bool = False,
        share_samples: bool = False,
        shard_weights: bool | str | Sequence[str] = False,
        stream_weights: bool | int | str = False,
        cache: str | CacheRule | None = None,
        trim_padding: bool | int = False,
        machine: Machine = H100,
        after: After | None = None,
        **further: int,
    ) -> ParallelProgram:
        """Divide the model over `cfg * pipefusion * ring * ulysses * tensor` ranks; needs no process group and no GPU.

        Args:
            cfg: ranks that divide the batch (conditional and unconditional halves).
            ulysses: ranks that exchange tokens for heads around attention (arXiv 2309.14509).
            ring: ranks around which keys and values travel (arXiv 2310.01889).
            pipefusion: stages of a pipeline through which patches of the latents pass (arXiv 2405.14430).
            tensor: ranks that divide heads and hidden features of blocks, and hold their parts of the weights (arXiv
                1909.08053). Not with `pipefusion`.
            patches: their number; default: as many as stages, or more, where on this machine messages between stages
                would keep ranks waiting; where that is illegal, the nearest smaller legal number, with a warning.
            warmup_steps: synchronous steps with which a request begins, at least 1.
            stages: how many of the model's blocks each of the `pipefusion` stages gets, or of twice as many, which
                go there and back again; default: what balances work and weights best, also cut inside blocks.
            kv_cache_dtype: of the keys and values that patches leave for later ones, "bfloat16" or "fp8_e4m3" (with a
                scale for each token and head); default: "auto", the model's own. With `pipefusion`; warmup steps read
                them too, and so are exact but for this rounding.
            pair_calls: `cfg` divides nothing: its ranks run whole forwards of different calls (`port` pairs them).
            share_samples: a batch may be smaller than `cfg`, whose ranks then share samples.
            shard_weights: each rank holds an equal part of the weights; what a block needs is gathered while the one
                before computes. Stages have weights of their own, which those who run the same one divide. Mesh dims,
                such as "ulysses" or "ulysses+ring": only ranks that differ along these divide them.
            stream_weights: weights lie in the host's memory, each rank's part of them, if there are several; what a
                block needs is uploaded while the one before computes. "20GiB", or a number of bytes: so much of them
                may stay on the GPU.
            cache: when a step reuses what the blocks of an earlier one added: "first-block:0.08", "timestep:0.1",
                "every:2" or "steps:0,1,2,5" (those that compute). Not with `pipefusion`. See docs/caching.md. A
                `CacheRule` with groups is for a program whose values are marked.
            trim_padding: rows at the end of an input that masks make idle, as of text that is padded, are not computed:
                what is left is the longest of the batch, rounded up to a multiple of so many rows (True: 64). The
                program is then one for inputs of this length, in these multiples. See docs/passes.md.
            machine: speeds of the GPUs and of their links, with which choices are priced; default: H100 on NVLink.
            after: called with every pass and the program it made.

        Raises:
            ParallelizeError: a degree is illegal for this model and input; names the nearest legal choice.
        """
        check_degree_names(further, inspect.signature(TracedProgram.parallelize).parameters)
        degrees = {"cfg": cfg, "pipefusion": pipefusion, "ring": ring, "ulysses": ulysses, "tensor": tensor, **further}
        mesh, machine = Mesh.of(**degrees), checked(machine)
        check_schedule(pipefusion, patches, warmup_steps, stages, kv_cache_dtype)
        batch = Batch.CALLS if pair_calls else Batch.SHARED if share_samples else Batch.DIVIDED
        keeping = Keeping.of(shard_weights, stream_weights)
        keeping.check(mesh, batch=batch)
        rule = None if cache is None else CacheRule.parse(cache)
        traced = self.trimmed(rows_to_trim(trim_padding)) if trim_padding is not False else self
        traced = traced if pipefusion == 1 else traced._placed
        analysed = traced.analysed if pipefusion == 1 else traced._aligned
        analysed = analysed if rule is None else note_region(analysed, rule, mesh, machine, after, batch=batch)
        stored = analysed.replace(stored=self.stored)
        if pipefusion == 1:
            familiar = self.familiar
            divided = divide(stored, mesh, machine, after, batch=batch, familiar=familiar, keeping=keeping)
            used = None if rule is None else CacheCount(rule)
            return ParallelProgram(traced.ir, analysed, divided, mesh, pair_calls, machine, used)
        schedule = (patches, warmup_steps, stages)
        staged, pipeline = make_pipeline(
            stored, mesh, *schedule, machine, after, batch=batch, keeping=keeping, kv_cache_dtype=kv_cache_dtype
        )
        return PipelinedProgram(traced.ir, staged, pipeline.program, mesh, pipeline, pair_calls, machine)


@dataclass(frozen=True, eq=False)
class ParallelProgram:
    """A program divided over a mesh; rank order is that of `mesh.names`, outer to inner.

    `original` is the program as traced, `analysed` its canonical form, `ir` that form divided. There is a `pipeline`
    under PipeFusion only, see `PipelinedProgram`. Choices are priced for `machine`. `cache`: the rule of a step cache,
    and how often `simulate_steps` has used it.
    """

    original: Program
    analysed: Program
    ir: Program
    mesh: Mesh
    pipeline: Pipeline | None = field(default=None, init=False)
    pair_calls: bool = False
    machine: Machine = H100
    cache: CacheCount | None = None
    _ranks: dict[int, Program] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, bodies: bool = False) -> str:
        """The textual form; with `bodies`, every operator. Under PipeFusion also what goes from stage to stage."""
        return program_text(self.ir, bodies=bodies)

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return self.mesh.world_size

    def report(self) -> Report:
        """FLOPs, weights, communication, fallbacks and who does how much of what; `str()` is a table."""
        found = make_report(self.original, self.ir, self.forwards, self.machine)
        return found if self.cache is None else dataclasses.replace(found, cache=self.cache.use)

    @property
    def forwards(self) -> int:
        """How many forwards a call of all ranks together runs."""
        return self.mesh.size((BATCH,)) if self.pair_calls else 1

    def rank(self, rank: int) -> Program:
        """The program of one rank, with static local sizes.

        Raises:
            ParallelizeError: under PipeFusion.
        """
        if rank not in self._ranks:
            self._ranks[rank] = run_passes(self.ir, [Specialize(rank)])
        return self._ranks[rank]

    @cached_property
    def cached(self) -> CachedProgram:
        """The programs of a step with a cache."""
        assert self.cache is not None, "there is a rule"
        return cut_cached(self.ir, self.cache.rule.variants)

    def cached_rank(self, rank: int) -> CachedProgram:
        """Those of one rank."""
        return self.cached.each(lambda one: run_passes(one, [Specialize(rank)]))

    def simulate(self, model: Module, example: Example, observe: RankObserver | None = None) -> list[Any]:
        """Run every rank in this thread, in lockstep; what forward writes into caches is written into `example`.

        Returns:
            One output of the model (its whole pytree) per rank.

        Raises:
            MismatchError: `example` differs from what the program was traced for; names the argument.
        """
        return self.simulate_steps(model, [example], observe)[0]

    def simulate_steps(
        self, model: Module, examples: Sequence[Example], observe: RankObserver | None = None
    ) -> list[list[Any]]:
        """`simulate` for consecutive denoising steps of one request; `observe` sees the values of the last one.

        Returns:
            For every step, the outputs of every rank.
        """
        model = as_module(model)
        return run_examples(self.original, model, examples, self._simulation(model), observe)

    def _simulation(self, model: nn.Module) -> Run:
        """What gives the outputs of every rank for the inputs of the next step."""
        state, everyone = model_state(self.original, model), range(self.world_size)
        if self.cache is not None:
            self.cache.calls = self.cache.skipped = 0
            device = model_device(model)
            return CachedSimulation([self.cached_rank(rank) for rank in everyone], state, device, self.cache).step
        ranks = [self.rank(rank) for rank in everyone]
        return lambda inputs, see: run_ranks(ranks, state, inputs, model_device(model, inputs), see)

    def emit(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        *,
        compile: bool = False,
        cuda_graph: bool = False,
        transport: str = "auto",
        attention: str = "auto",
        handshake: bool = True,
        timeout: float | None = None,
        weights: str | Path | None = None,
        release: bool = False,
        data: int = 1,
    ) -> Emitted:
        """The module of this process's rank, in one of `data` replicas; see `xdit_ir.runtime.emitted.emit` and, for the
        options, `Execution` and `xdit_ir.emission.checkpoint.Loading`."""
        execution = Execution(compile, cuda_graph, transport, attention, handshake, timeout=timeout)
        parts = bool(self.ir.stored)  # of weights, which are held by no model
        loading = Loading(weights, release or (parts and weights is None))
        return emit(self, model, device, RunOptions(execution, loading, checked_data(data)))


@dataclass(frozen=True, eq=False)
class PipelinedProgram(ParallelProgram):
    """A program under PipeFusion: `analysed` has stages, and in `ir` the mesh dim `pipefusion` counts patches."""

    pipeline: Pipeline = field()

    def text(self, *, bodies: bool = False) -> str:
        """The textual form, and what goes from stage to stage; with `bodies`, every operator."""
        return f"{pipeline_text(self.pipeline)}\n{super().text(bodies=bodies)}"

    def report(self) -> Report:
        """As that of a program without stages; a forward is a displaced step."""
        return pipeline_report(self.original, self.pipeline, self.forwards, self.machine)

    def rank(self, rank: int) -> Program:
        """Raises `ParallelizeError`: a rank has a program for each patch, see `pipeline.part`."""
        raise ParallelizeError("under pipefusion a rank runs a program for each patch: see pipeline.part")

    def simulate_steps(
        self, model: Module, examples: Sequence[Example], observe: RankObserver | None = None
    ) -> list[list[Any]]:
        """As of any program; the first `warmup_steps` are synchronous (and exact), later ones read buffers."""
        model = as_module(model)
        run = PipelineSimulation(self.pipeline, model_state(self.original, model), model_device(model))
        return run_examples(self.original, model, examples, run.step, observe)

    def run_steps(self, model: Module, examples: Sequence[Example]) -> list[list[Any]]:
        """As `simulate_steps`, by the programs that ranks run, which are made from those of patches and stages."""
        model = as_module(model)
        run = RankSimulation(self.pipeline, model_state(self.original, model), model_device(model))
        return run_examples(self.original, model, examples, lambda inputs, _: run.step(inputs))

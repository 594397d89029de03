"""What a ported module has made for the calls it got: a program and its runner for every kind of call."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from xdit_ir import capture
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.caching.hooked import caches_away, hooked_cache, states_of
from xdit_ir.capture.binder import BufferGuards
from xdit_ir.capture.failures import RaisedByForward
from xdit_ir.capture.inputs import bind_arguments, same_tensors
from xdit_ir.capture.mode_guards import check_asked, mode_refusal, torch_settings
from xdit_ir.capture.overwrites import overwritten
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.deferral.gradients import gradient_refusal
from xdit_ir.emission.context import RunOptions, on_all_ranks
from xdit_ir.emission.execution import Tensors
from xdit_ir.emission.state import hooked
from xdit_ir.emission.structure import program_key
from xdit_ir.errors import GradientError, MismatchError, ParallelizeError, StateError, TraceError, XditError
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.mesh import BATCH, MESH_DIMS, Mesh
from xdit_ir.ir.program import Program, Stored, TensorSpec
from xdit_ir.passes.find_tokens import Streams
from xdit_ir.passes.split_batch import LARGE
from xdit_ir.planning.hardware import slowest_here
from xdit_ir.porting.grid import in_a_grid
from xdit_ir.porting.planned import Unplanned, machine_of_job
from xdit_ir.porting.settings import ModelSettings
from xdit_ir.porting.worth import Worth
from xdit_ir.reflection.methods import Method
from xdit_ir.runtime.build import RunnerFactory
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.sharding.report import CacheUse, Report
from xdit_ir.transport.handshake import (
    agree,
    agree_contents,
    call_facts,
    call_tensors,
    digest,
    fact,
    failure_text,
    guarded,
)

LIMIT = 128  # specialisations kept per module, the most recently used ones
FEW = (
    "cfg={}: a call has a batch of fewer samples, which ranks share; if every call has, use a smaller cfg and more "
    "ulysses or ring"
)
Mode = tuple[Any, ...]
Bound = tuple[Tensors, Tensors]


@dataclass(frozen=True, eq=False)
class Arguments:
    """Those of one call of forward."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Those of the tensors among them."""
        return tuple(x.shape for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Tensor))


@dataclass(frozen=True, eq=False)
class Specialisation:
    """What runs calls of some kind, and what it was made for besides inputs and weights; `shapes`: of that call, and
    `same`: which of its inputs were one tensor."""

    mode: Mode
    shapes: tuple[torch.Size, ...]
    same: tuple[int, ...]
    settings: ModelSettings
    buffers: BufferGuards
    program: ParallelProgram
    runner: RankRunner

    def bind(self, mode: Mode, given: Arguments) -> Bound | None:
        """The inputs and weights for a call; None if this was not made for it."""
        if mode != self.mode:
            return None
        try:
            bound = self.runner.bind(given.args, given.kwargs)
            self.buffers.check()
        except MismatchError:
            return None
        if same_tensors(bound[0]) != self.same or not check_asked(self.program.original):
            return None
        return bound if self.settings.unchanged() else None


@dataclass(eq=False)
class Specialisations:
    """Those of one `model`, in `found` with the most recently used first. `schedule`: what `parallelize` gets.
    `verified`: the structures of programs that were verified after every pass, and their `Streams`. `stored`: how
    ranks hold parts of weights already (of these `types`), which later programs use, as nobody has all of a weight any
    more. `unplanned`: until the first call, where it is to choose `mesh` and `schedule`. `whole`: why the last call ran
    whole; `alone`: why all do until `clear`."""

    model: nn.Module
    mesh: Mesh
    schedule: Mapping[str, Any]
    options: RunOptions
    worth: Worth | None = None
    factory: RunnerFactory | None = None
    found: list[Specialisation] = field(default_factory=list)
    verified: dict[Hashable, Streams] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    types: dict[str, TensorSpec] = field(default_factory=dict)
    tracing: bool = False
    turn: Any = field(default_factory=threading.RLock)
    whole: str = ""
    alone: str = ""
    unplanned: Unplanned | None = None

    @staticmethod
    def of(
        model: nn.Module,
        mesh: Mesh,
        schedule: Mapping[str, Any],
        options: RunOptions,
        *,
        pays: bool,
        unplanned: Unplanned | None = None,
    ) -> Specialisations:
        """`pays`: calls are divided where that pays, or weights are divided, and run whole where it does not or cannot
        be done."""
        always = bool(schedule.get("shard_weights") or schedule.get("stream_weights"))
        worth = Worth(model, schedule["machine"] or slowest_here(), isinstance(model, Method), always) if pays else None
        return Specialisations(model, mesh, schedule, options, worth, unplanned=unplanned)

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """Of all that was made, the most recently used first."""
        return tuple(one.program for one in self.found)

    def report(self) -> Report:
        """That of the program of the last call, and how it runs on this rank.

        Raises:
            ParallelizeError: there was no call yet, or it ran whole.
        """
        if self.whole:
            raise ParallelizeError(f"the last call ran whole on every rank: {self.whole}")
        found = next(iter(self.found), None)
        if found is None:
            raise ParallelizeError("report() tells of the program of the last forward, and there was none yet")
        return replace(found.program.report(), execution=found.runner.execution, cache=self.cache)

    @property
    def cache(self) -> CacheUse | None:
        """How often a step cache was of use, on this rank."""
        return self.found[0].runner.cache if self.found else None

    def call(self, given: Arguments) -> Any:
        """The model's result, on all ranks; raises `MismatchError` on all if they make different calls."""
        with self.turn:  # one thread at a time
            return self._call(given)

    def _call(self, given: Arguments) -> Any:
        self.whole = ""
        if isinstance(self.model, Method) and (where := hooked(self.model.owner)) is not None:
            self.whole = f"{where} has a hook of accelerate, which the method itself calls"
            return self.model(*given.args, **given.kwargs)
        if self.worth is None:
            return self._divided_or_alone(given)
        self.whole = self.worth.whole(given)
        if not self.whole:
            try:
                return self._divided(given)
            except (TraceError, ParallelizeError, GradientError) as refusal:
                if self._given_up:
                    raise
                self.whole = self.worth.refuse(given, refusal)
        if self._given_up:
            raise ParallelizeError(f"this call cannot be divided, and weights are divided already: {self.whole}")
        result = self.model(*given.args, **given.kwargs)
        if self.worth.last is not None:
            self.worth.last.settle(self.model)
        return result

    @property
    def _given_up(self) -> bool:
        """Whether the model has no weights to run whole with."""
        return self.options.loading.holds and any(x.is_meta for x in self.model.parameters())

    def _divided_or_alone(self, given: Arguments) -> Any:
        """Where one process has nobody to share with, a model that keeps a state is run as it is."""
        if not self.alone:
            try:
                return self._divided(given)
            except StateError as refusal:
                if self.mesh.world_size > 1 or self.options.loading.holds:
                    raise
                self.alone = str(refusal)
                warnings.warn(f"one process runs the model itself, until `reset`: {refusal}", stacklevel=2)
        self.whole = self.alone
        return self.model(*given.args, **given.kwargs)

    def _divided(self, given: Arguments) -> Any:
        if self.tracing:
            raise TraceError("forward calls the port of the model that it belongs to; call what it stands for instead")
        with on_all_ranks(self.mesh, self.options):
            device = self.options.loading.device(self.model, inputs=(*given.args, *given.kwargs.values()))
        if self.unplanned is not None:
            self._plan(self.unplanned, given, device)
        factory, mode = self._factory(device), self._mode(device)
        with factory.context.communicator.working():
            refusal = gradient_refusal(lambda: factory.context.parameters, given.args, given.kwargs) or mode_refusal()
            bound = None if refusal else self._find(mode, given)
            self._agree(factory, mode, given, bound, refusal)
            if refusal is not None:
                raise factory.context.communicator.agreed(refusal)
            if bound is not None:
                return self.found[0].runner.run(*bound, given.args, given.kwargs)
            with collector_paused():  # what is made here is looked through once, while the device computes
                runner = self._specialise(factory, mode, given).runner
                bound = runner.bind(given.args, given.kwargs)
                factory.agreement.weights(runner, bound[1])
                return runner.run(*bound, given.args, given.kwargs)

    def _plan(self, unplanned: Unplanned, given: Arguments, device: torch.device) -> None:
        """Let degrees be chosen; they stay for all further calls."""
        signature = inspect.signature(self.model.forward)
        with caches_away(self.model):
            chosen = unplanned.choose(self.model, partial(_example, signature, given), self.options, device)
        self.schedule, self.unplanned = {**self.schedule, **chosen}, None
        self.mesh = Mesh.of(**{name: self.schedule[name] for name in MESH_DIMS})

    def finish(self) -> None:
        """Run the calls that wait for others of their step, before weights change."""
        with self.turn:
            if self.factory is not None:
                self.factory.finish()

    def clear(self) -> None:
        """Forget all, free what they recorded, and give back process groups."""
        for one in self.found:
            one.runner.forget()
        self.found.clear()
        self.stored.clear()
        self.types.clear()
        self.alone = ""
        if self.factory is not None:
            self.factory.context.communicator.close()
            self.factory = None

    def _factory(self, device: torch.device) -> RunnerFactory:
        if self.factory is not None and self.factory.context.communicator.ended:
            self.clear()
        if self.factory is None or self.factory.context.device != device:
            self.factory = RunnerFactory(self.options.context(self.model, self.mesh, device), pairs=True)
        return self.factory

    def _mode(self, device: torch.device) -> Mode:
        """What a trace depends on besides arguments and weights."""
        return device, self.model.training, *torch_settings()

    def _find(self, mode: Mode, given: Arguments) -> Bound | None:
        """The inputs and weights for the specialisation that a call is for, which is moved to the front."""
        shapes = given.shapes
        for one in sorted(self.found, key=lambda one: one.shapes != shapes):
            bound = one.bind(mode, given)
            if bound is not None:
                self.found.remove(one)
                self.found.insert(0, one)
                return bound
        return None

    def _agree(
        self, factory: RunnerFactory, mode: Mode, given: Arguments, bound: Bound | None, refusal: XditError | None
    ) -> None:
        """All ranks make the same call; contents are compared only of inputs that some specialisation was made for."""
        if factory.context.communicator.line is None:
            return

        def facts() -> dict[str, str]:
            contents = guarded(one.runner.program for one in self.found)
            facts = call_facts(factory.context.parameters, given.args, given.kwargs, contents)
            options = {"the degrees of port": fact(self.schedule), "training mode and autocast": fact(mode[1:])}
            return facts | options | ({} if refusal is None else {"whether it is refused": failure_text(refusal)})

        state = {"the program of this call": "not made yet" if bound is None else "made before"}
        if bound is None:
            agree(factory.context.communicator, digest(facts()), lambda: facts() | state)
        else:
            factory.agreement.call(self.found[0].runner, *bound, lambda: facts() | state)

    def _specialise(self, factory: RunnerFactory, mode: Mode, given: Arguments) -> Specialisation:
        """A specialisation for a call, at the front."""
        signature = factory.context.parameters
        if self.schedule["machine"] is None:
            self.schedule = {**self.schedule, "machine": machine_of_job(factory.context.communicator)}

        def make() -> ParallelProgram:
            if self.worth is not None:
                self.worth.check_call(given, self.schedule["machine"])
            cache = hooked_cache(self.model)
            factory.branch = None if cache is None else cache.branch
            try:
                with caches_away(self.model):
                    marked = {} if cache is None else cache.meaning.groups
                    program = capture.trace(self.model, _example(signature, given), keep=True, marked=marked)
            except RaisedByForward as failure:
                raise failure.error from None
            self._check_types(program)
            program = program.replace(state={**self.types, **program.state})
            traced = TracedProgram(program, stored=self.stored).trimmed(self.schedule.get("trim_padding", 0))
            key = program_key(traced.canonical or program)
            familiar = key in self.verified
            traced = replace(traced, familiar=familiar, streams=self.verified.get(key))
            schedule = self.schedule if cache is None else cache.among(self.schedule, traced.analysed)
            if isinstance(self.model, Method):
                grid = in_a_grid(traced.analysed, self.mesh, schedule["machine"])
                schedule = {**schedule, **grid.degrees}
            made = _parallelized(traced, schedule)
            if key is not None and not familiar:
                self.verified[key] = Streams.of(traced.analysed)  # stages may lie across blocks
            if self.worth is not None:
                self.worth.check(made)
            return made

        agree_contents(factory.context.communicator, call_tensors(signature, given.args, given.kwargs))
        self.tracing = True
        try:
            # Counters and profilers around the call are for what the model does.
            with _disable_current_modes():
                program, runner = factory.build(make)
        finally:
            self.tracing = False
        self.stored |= program.ir.stored
        members = {name for one in program.ir.stored.values() for name, _ in one.members}
        self.types |= {name: spec for name, spec in program.ir.state.items() if name in members}
        guards = BufferGuards(self.model, program.original)
        objects = [x for x in pytree.tree_leaves((given.args, given.kwargs)) if not isinstance(x, torch.Tensor)]
        same = same_tensors(runner.bind(given.args, given.kwargs)[0])
        unread = overwritten(self.model, program.original.signature.effects) | states_of(self.model)
        earlier = (one.settings for one in self.found)
        settings = ModelSettings.like(earlier, self.model, objects, unread, runner.places)
        made = Specialisation(mode, given.shapes, same, settings, guards, program, runner)
        if len(self.found) >= LIMIT:
            del self.found[LIMIT - 1 :]
            warnings.warn(
                f"more than {LIMIT} specialisations: forward is traced again and again because of changes in "
                f"{_changing(self.found[0].runner, made.runner)}; pass what changes at every step as a tensor",
                stacklevel=2,
            )
        self.found.insert(0, made)
        return made

    def _check_types(self, program: Program) -> None:
        """Raise `MismatchError` if weights have another type than the parts of them that there are."""
        for name, spec in self.types.items():
            if (wanted := program.state.get(name, spec)) != spec:
                raise MismatchError(
                    f"parameter {name}: the program needs {wanted.dtype}{list(wanted.shape)}, and ranks hold parts of "
                    f"{spec.dtype}{list(spec.shape)} (shard_weights=True, tensor=); cast the model before the first "
                    "forward, or port it anew"
                )


def _example(signature: inspect.Signature, given: Arguments) -> Any:
    """The arguments of a call, as `trace` takes them."""
    named = bind_arguments(signature, given.args, given.kwargs, MismatchError)
    example = tuple(given.args) if given.args and not given.kwargs else named
    return pytree.tree_map_only(Deferred, materialize, example)


def _parallelized(traced: TracedProgram, schedule: Mapping[str, Any]) -> ParallelProgram:
    """`cfg` divides the batch; or shares it, where it has few samples; or, where it cannot be divided, runs calls."""
    try:
        return traced.parallelize(**schedule)
    except ParallelizeError:
        degree = schedule[BATCH]
        if not 2 <= degree <= LARGE:
            raise
    if degree > 2:
        with suppress(ParallelizeError):
            shared = traced.parallelize(**schedule, share_samples=True)
            warnings.warn(FEW.format(degree), stacklevel=2)
            return shared
    return traced.parallelize(**schedule, pair_calls=True)


def _changing(last: RankRunner, new: RankRunner) -> str:
    """The inputs in which two specialisations differ."""
    names = [name for name, value in new.facts.items() if last.facts.get(name) != value]
    return ", ".join(name for name in names if not name.startswith("the ")) or "the model"

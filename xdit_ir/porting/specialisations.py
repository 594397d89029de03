"""What a ported module has made for the calls it got: a program and its runner for every kind of call."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from xdit_ir.api import ParallelProgram
from xdit_ir.caching.hooked import caches_away, hooked_cache
from xdit_ir.capture.mode_guards import mode_refusal, torch_settings
from xdit_ir.deferral.gradients import gradient_refusal
from xdit_ir.emission.context import RunOptions, on_all_ranks
from xdit_ir.emission.state import hooked
from xdit_ir.errors import GradientError, ParallelizeError, StateError, TraceError, XditError
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.planning.hardware import slowest_here
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.making import Making
from xdit_ir.porting.planned import Unplanned, machine_of_job
from xdit_ir.porting.specialisation import Bound, Mode, Specialisation
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


@dataclass(eq=False)
class Specialisations:
    """Those of one `model`, in `found` with the most recently used first. `schedule`: what `parallelize` gets.
    `making`: what makes their programs. `unplanned`: until the first call, where it is to choose `mesh` and `schedule`.
    `whole`: why the last call ran whole; `alone`: why all do until `clear`."""

    model: nn.Module
    mesh: Mesh
    schedule: Mapping[str, Any]
    options: RunOptions
    making: Making
    factory: RunnerFactory | None = None
    found: list[Specialisation] = field(default_factory=list)
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
        return Specialisations(model, mesh, schedule, options, Making(model, worth), unplanned=unplanned)

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
        return found.report

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
        worth = self.making.worth
        if worth is None:
            return self._divided_or_alone(given)
        self.whole = worth.whole(given)
        if not self.whole:
            try:
                return self._divided(given)
            except (TraceError, ParallelizeError, GradientError) as refusal:
                if self._given_up:
                    raise
                self.whole = worth.refuse(given, refusal)
        if self._given_up:
            raise ParallelizeError(f"this call cannot be divided, and weights are divided already: {self.whole}")
        result = self.model(*given.args, **given.kwargs)
        if worth.last is not None:
            worth.last.settle(self.model)
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
        if self.making.busy:
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
            chosen = unplanned.choose(self.model, partial(given.example, signature), self.options, device)
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
        self.making.forget()
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
            cache = hooked_cache(self.model)
            factory.branch = None if cache is None else cache.branch
            return self.making.make(given, signature, self.schedule, self.mesh, cache)

        agree_contents(factory.context.communicator, call_tensors(signature, given.args, given.kwargs))
        with self.making.alone():
            program, runner = factory.build(make)
        self.making.keep(program.ir)
        made = Specialisation.of(self.model, mode, given, program, runner, [one.settings for one in self.found])
        if len(self.found) >= LIMIT:
            del self.found[LIMIT - 1 :]
            warnings.warn(
                f"more than {LIMIT} specialisations: forward is traced again and again because of changes in "
                f"{_changing(self.found[0].runner, made.runner)}; pass what changes at every step as a tensor",
                stacklevel=2,
            )
        self.found.insert(0, made)
        return made


def _changing(last: RankRunner, new: RankRunner) -> str:
    """The inputs in which two specialisations differ."""
    names = [name for name, value in new.facts.items() if last.facts.get(name) != value]
    return ", ".join(name for name in names if not name.startswith("the ")) or "the model"

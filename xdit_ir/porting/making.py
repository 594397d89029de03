"""Programs for the calls of a ported model: traced and divided, with what one of them has taught for the next."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from xdit_ir import capture
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.caching.hooked import HookedCache, caches_away
from xdit_ir.capture.failures import RaisedByForward
from xdit_ir.emission.structure import program_key
from xdit_ir.errors import MismatchError, ParallelizeError
from xdit_ir.ir.mesh import BATCH, Mesh
from xdit_ir.ir.program import Program, Stored, TensorSpec
from xdit_ir.passes.find_tokens import Streams
from xdit_ir.passes.split_batch import LARGE
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.grid import in_a_grid
from xdit_ir.porting.worth import Worth
from xdit_ir.reflection.methods import Method

FEW = (
    "cfg={}: a call has a batch of fewer samples, which ranks share; if every call has, use a smaller cfg and more "
    "ulysses or ring"
)


@dataclass(eq=False)
class Making:
    """Makes the programs of one `model`. `worth`: what must be saved, if anything. `verified`: the structures of
    programs that were verified after every pass, and their `Streams`. `stored`: how ranks hold parts of weights already
    (of these `types`), which later programs use, as nobody has all of a weight any more."""

    model: nn.Module
    worth: Worth | None = None
    verified: dict[Hashable, Streams] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    types: dict[str, TensorSpec] = field(default_factory=dict)
    busy: bool = False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While a program is made; counters and profilers around the call are for what the model does."""
        self.busy = True
        try:
            with _disable_current_modes():
                yield
        finally:
            self.busy = False

    def make(
        self,
        given: Arguments,
        signature: inspect.Signature,
        schedule: Mapping[str, Any],
        mesh: Mesh,
        cache: HookedCache | None,
    ) -> ParallelProgram:
        """The program for calls like this one. `schedule`: what `parallelize` gets, `cache`: that in the model's hooks.

        Raises:
            TraceError, ParallelizeError, MismatchError: it cannot be traced or divided, saves too little, or needs
                weights of another type than the parts that ranks hold.
        """
        if self.worth is not None:
            self.worth.check_call(given, schedule["machine"])
        traced = self._trace(given, signature, schedule, cache)
        key = program_key(traced.canonical or traced.ir)
        traced = replace(traced, familiar=key in self.verified, streams=self.verified.get(key))
        if cache is not None:
            schedule = cache.among(schedule, traced.analysed)
        if isinstance(self.model, Method):
            schedule = {**schedule, **in_a_grid(traced.analysed, mesh, schedule["machine"]).degrees}
        made = _parallelized(traced, schedule)
        if key is not None and not traced.familiar:
            self.verified[key] = Streams.of(traced.analysed)  # stages may lie across blocks
        if self.worth is not None:
            self.worth.check(made)
        return made

    def keep(self, program: Program) -> None:
        """Later programs use the parts of weights that this one, which is built, stores."""
        self.stored |= program.stored
        members = {name for one in program.stored.values() for name, _ in one.members}
        self.types |= {name: spec for name, spec in program.state.items() if name in members}

    def forget(self) -> None:
        """Nothing is stored any more."""
        self.stored.clear()
        self.types.clear()

    def _trace(
        self, given: Arguments, signature: inspect.Signature, schedule: Mapping[str, Any], cache: HookedCache | None
    ) -> TracedProgram:
        marked = {} if cache is None else cache.meaning.groups
        try:
            with caches_away(self.model):
                program = capture.trace(self.model, given.example(signature), keep=True, marked=marked)
        except RaisedByForward as failure:
            raise failure.error from None
        self._check_types(program)
        program = program.replace(state={**self.types, **program.state})
        return TracedProgram(program, stored=self.stored).trimmed(schedule.get("trim_padding", 0))

    def _check_types(self, program: Program) -> None:
        """Raise `MismatchError` if weights have another type than the parts of them that there are."""
        for name, spec in self.types.items():
            if (wanted := program.state.get(name, spec)) != spec:
                raise MismatchError(
                    f"parameter {name}: the program needs {wanted.dtype}{list(wanted.shape)}, and ranks hold parts of "
                    f"{spec.dtype}{list(spec.shape)} (shard_weights=True, tensor=); cast the model before the first "
                    "forward, or port it anew"
                )


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

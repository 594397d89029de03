"""Guidance by several calls a step: each part of the mesh dim `cfg` runs one of them.

A pipeline that calls its transformer once with and once without the prompt (or a third time, with layers left out)
reads no result before it has made all calls. So calls are put off, and their results are `Deferred`, until there are as
many as `cfg` has parts: each part runs one whole forward (at its other degrees), and the results are exchanged at once,
on all ranks. Nothing about the calls matters but that none depends on one before: they may have other shapes, and
programs of their own. A result that is read before that many calls were made completes the set as it is: the calls
that wait are run by a part each. Where that is one only, all ranks run it, which is right, and saves nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import materialize, pending
from xdit_ir.deferral.gradients import without_gradients
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors
from xdit_ir.errors import MismatchError
from xdit_ir.ir.graphs import results_of
from xdit_ir.ir.mesh import BATCH
from xdit_ir.ir.program import Program, TensorSpec
from xdit_ir.runtime.runner import Runner
from xdit_ir.runtime.unwritten import Glimpses, Unwritten
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import ARGUMENTS, Facts, agree, digest

PAIRED = (BATCH,)
EARLY = (
    "cfg={parts} divides neither a batch nor {parts} calls here: the result of a forward was read when {calls} had "
    "been called, so the other parts of cfg made nothing of their own; use cfg={calls} and more ulysses or ring"
)

STALE = (
    "weights were written to while a call waited for the others of its step (cfg divides calls), so that its result "
    "cannot be computed any more; read the results of all calls before weights are changed"
)

Work = Callable[[bool], Sequence[torch.Tensor]]
"""What a call computes; told whether all parts run it."""


@dataclass(eq=False)
class PairedCall:
    """A forward that is put off, with results of the types `outputs`; it needs what it reads as it is `now`."""

    work: Work
    outputs: Sequence[TensorSpec]
    pairing: Pairing
    now: Unwritten
    results: Sequence[torch.Tensor] | None = None

    @property
    def waits(self) -> bool:
        """Whether it can be run, and was not."""
        return self.results is None and self.now.holds()

    def run(self, *, everywhere: bool = False) -> Sequence[torch.Tensor]:
        """Compute the results on this rank and those of its part of `cfg`; `everywhere`: on those of all parts."""
        if self.results is None:
            self.results = self.work(everywhere)
        return self.results

    def read(self, index: int) -> torch.Tensor:
        """A result that somebody reads; runs the call, and those that wait with it, if they have not been run."""
        if self.results is None:
            if not self.waits:
                raise MismatchError(STALE)
            with self.pairing.communicator.working():
                self.pairing.read_early(self)
        assert self.results is not None
        return self.results[index]


@dataclass(frozen=True)
class _Result:
    """The source of a deferred result."""

    call: PairedCall
    index: int

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """A range of it."""
        return self.whole().narrow(dim, start, stop - start)

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.call.read(self.index)


@dataclass(eq=False)
class Pairing:
    """The calls of one module, whichever of its programs they run. Making one is collective."""

    communicator: Communicator
    _waiting: list[PairedCall] = field(default_factory=list, init=False)
    _complete: bool = field(default=False, init=False)
    _glimpses: Glimpses = field(default_factory=Glimpses, init=False)

    def __post_init__(self) -> None:
        self.communicator.prepare([PAIRED])

    @property
    def parts(self) -> int:
        """How many calls run at once."""
        return self.communicator.mesh.size(PAIRED)

    def call(self, work: Work, outputs: Sequence[TensorSpec], read: Tensors) -> Sequence[torch.Tensor]:
        """The results of a forward whose inputs do not depend on one that waits: deferred for all but the last. It has
        `read` weights and constants when it is run."""
        self._waiting = self._still_waiting()
        call = PairedCall(work, outputs, self, Unwritten(read, self._glimpses))
        self._waiting.append(call)
        if len(self._waiting) == self.parts:
            self._complete = True
            self._exchange()
        results = call.results
        if results is None:
            results = [
                pending(_Result(call, index), spec.shape, spec.dtype, self.communicator.device)
                for index, spec in enumerate(outputs)
            ]
        return results

    def read_early(self, call: PairedCall) -> None:
        """Run a call that waits, and those that wait with it, which takes all ranks: they must read too, and all of
        them raise if they do not.

        A single call needs no others on a part of one rank, so there a rank may read what the others do not (a log, a
        preview).
        """
        waiting = [one for one in self._waiting if one.waits]
        together = call in waiting and len(waiting) > 1
        if not self._complete:
            self._complete = True  # says it once
            warnings.warn(EARLY.format(parts=self.parts, calls=len(waiting) if together else 1), stacklevel=2)
        if together or self.communicator.mesh.world_size > self.parts:
            facts = {ARGUMENTS: "no call yet: it reads the result of its last one"}
            agree(self.communicator, digest(facts), lambda: facts)
        if together:
            self._waiting = self._still_waiting()
            self._exchange()
        call.run(everywhere=True)

    def finish(self) -> None:
        """Run the calls that wait, before weights change. All ranks do the same."""
        for call in self._waiting:
            if call.waits and call.outputs:
                call.read(0)

    def _still_waiting(self) -> list[PairedCall]:
        """The calls that wait on all ranks: nobody has read their results, or changed the weights."""
        waits = [call.waits for call in self._waiting]
        line = self.communicator.line
        if line is not None:
            everyone = line.exchange(("pair", line.count()), waits, self.communicator.timeout)
            waits = [all(told) for told in zip(*everyone, strict=True)]
        return [call for call, still in zip(self._waiting, waits, strict=True) if still]

    def _exchange(self) -> None:
        """Each part runs one of the calls that wait and gets the results of the others."""
        mesh, rank = self.communicator.mesh, self.communicator.rank
        calls, self._waiting = self._waiting, []
        parts, mine = mesh.group(rank, PAIRED), mesh.index(rank, PAIRED)
        if mine < len(calls):
            calls[mine].run()
        group = self.communicator.group(PAIRED)
        for part, call in zip(parts, calls, strict=False):
            if call.results is None:
                call.results = [
                    torch.empty(spec.shape, dtype=spec.dtype, device=self.communicator.device) for spec in call.outputs
                ]
            call.results = [result.contiguous() for result in call.results]
            for result in call.results:
                dist.broadcast(result, self.communicator.process(part), group=group)


class PairedRunner(Runner):
    """Runs one of several calls on this rank; what all but the last give is `Deferred`."""

    def __init__(self, context: RankContext, program: Program, facts: Facts, pairing: Pairing) -> None:
        super().__init__(context, program, facts)
        self._pairing = pairing
        found = results_of(program.graph)  # those that are an input are the caller's own tensors
        self._back = [self._inputs.index(node.name) if node.op == "placeholder" else None for node in found]

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result; inputs that were made of that of a call which waits are finished first."""
        given = copied(inputs)
        read = [*weights, *self.constants]
        results = self._pairing.call(lambda _: self.compute(given, weights), self.outputs, read)
        results = [x if own is None else inputs[own] for x, own in zip(results, self._back, strict=True)]
        return build_output(self.program.signature, without_gradients(results, weights))


def copied(inputs: Tensors) -> Tensors:
    """The inputs of a call that is put off: the caller may write to its own."""
    finished = [materialize(x) for x in inputs]
    with torch.inference_mode(False):
        return [x.clone() for x in finished]

"""Classifier-free guidance by two calls: each half of the mesh dim `cfg` runs one of them.

A pipeline that calls its transformer once with and once without the prompt reads neither result before it has made both
calls. So the first call is put off, and its result is a `Deferred`. The second one completes the pair: every half of
`cfg` runs one whole forward (at its other degrees), and the results are exchanged at once, on all ranks. Nothing about
the calls matters but that the second does not depend on the first: they may have other shapes, and programs of their
own. Reading the first result early runs the first call everywhere, which is right, and saves nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import materialize, pending
from xdit_ir.deferral.gradients import without_gradients
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors
from xdit_ir.ir.mesh import BATCH
from xdit_ir.ir.program import Program
from xdit_ir.runtime.runner import Runner
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import ARGUMENTS, Facts, agree, digest

PAIRED = (BATCH,)
EARLY = (
    "cfg=2 divides neither a batch nor a pair of calls here: the result of a forward was read before the next forward "
    "was called, so both halves of cfg ran it; use cfg=1 and more ulysses or ring"
)


@dataclass(eq=False)
class PairedCall:
    """A forward that is put off, with copies of its inputs, as the caller may write to its own."""

    runner: Runner
    inputs: Tensors
    weights: Tensors
    pairing: Pairing
    results: Sequence[torch.Tensor] | None = None

    def run(self) -> Sequence[torch.Tensor]:
        """Compute the results on this rank and those of its half."""
        if self.results is None:
            self.results = self.runner.compute(self.inputs, self.weights)
        return self.results

    def read(self, index: int) -> torch.Tensor:
        """A result that somebody reads; runs the call if nothing has completed the pair."""
        if self.results is None:
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
    _waiting: PairedCall | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.communicator.prepare([PAIRED])

    def call(self, runner: Runner, inputs: Tensors, weights: Tensors) -> Any:
        """The result of a forward whose inputs do not depend on one that waits: deferred for the first of a pair."""
        first = self._first()
        with torch.inference_mode(False):
            call = PairedCall(runner, [x.clone() for x in inputs], weights, self)
        signature = runner.program.signature
        if first is None:
            self._waiting = call
            results = [
                pending(_Result(call, index), spec.shape, spec.dtype, self.communicator.device)
                for index, spec in enumerate(runner.outputs)
            ]
            return build_output(signature, without_gradients(results, weights))
        self._exchange(first, call)
        assert call.results is not None
        return build_output(signature, without_gradients(call.results, weights))

    def read_early(self, call: PairedCall) -> None:
        """Run a call that waits on both halves; its other ranks must read too, and all of them raise if they do not.

        A half of one rank needs no others, so there a rank may read what the others do not (a log, a preview).
        """
        if not self._warned:
            self._warned = True
            warnings.warn(EARLY, stacklevel=2)
        if self.communicator.mesh.world_size > self.communicator.mesh.size(PAIRED):
            facts = {ARGUMENTS: "no call yet: it reads the result of its last one"}
            agree(self.communicator, digest(facts), lambda: facts)
        call.run()

    def _first(self) -> PairedCall | None:
        """The call that waits, if one does on all ranks and nobody has read its result."""
        first, self._waiting = self._waiting, None
        waits = first is not None and first.results is None
        line = self.communicator.line
        if line is not None:
            waits = all(line.exchange(("pair", line.count()), waits, self.communicator.timeout))
        return first if waits else None

    def _exchange(self, first: PairedCall, second: PairedCall) -> None:
        """Each half runs one of the calls and gets the results of the other."""
        mesh, rank = self.communicator.mesh, self.communicator.rank
        pair, mine = mesh.group(rank, PAIRED), mesh.index(rank, PAIRED)
        (first, second)[mine].run()
        group = self.communicator.group(PAIRED)
        for place, call in enumerate((first, second)):
            if call.results is None:
                call.results = [
                    torch.empty(spec.shape, dtype=spec.dtype, device=self.communicator.device)
                    for spec in call.runner.outputs
                ]
            call.results = [result.contiguous() for result in call.results]
            for result in call.results:
                dist.broadcast(result, self.communicator.process(pair[place]), group=group)


class PairedRunner(Runner):
    """Runs one of two calls on this rank; what the first of a pair gives is `Deferred`."""

    def __init__(self, context: RankContext, program: Program, facts: Facts, pairing: Pairing) -> None:
        super().__init__(context, program, facts)
        self._pairing = pairing

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result; inputs that were made of that of a call which waits are finished first."""
        return self._pairing.call(self, [materialize(x) for x in inputs], weights)

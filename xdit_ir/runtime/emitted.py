"""`emit`: the module that runs one rank's program in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.inputs import BufferGuards
from xdit_ir.emission.codegen import EmittedBody
from xdit_ir.emission.context import RankContext, RunOptions
from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Program
from xdit_ir.parallel import Parallel
from xdit_ir.runtime.build import RunnerFactory
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.transport.handshake import agree, call_facts, digest, failure_text, guarded


def emit(
    parallel: Parallel, model: nn.Module, device: torch.device | str | None = None, options: RunOptions | None = None
) -> Emitted:
    """The module of this process's rank. Collective: every rank of the job calls it for the same program.

    Args:
        model: holds the weights, which are used by reference; it is not changed.
        device: where to run; the model must be there. Default: where the model is.
        options: default: eagerly, with a handshake, and weights by reference from the model.

    Raises:
        ParallelizeError: the job has another number of processes than the program has ranks.
        MismatchError: the weights are not loaded, or not those of the program; or the ranks differ.
    """
    options = options or RunOptions()
    context = options.context(model, parallel.mesh, options.loading.device(model, device))
    _, runner = RunnerFactory(context).build(lambda: parallel)
    return Emitted(context, runner)


class Emitted(Shadow):
    """Runs this rank's part of a program, with the weights, attributes and `forward` signature of the model.

    Weights are looked up by name at every call, so loading others into the model takes effect; after a change of
    their shapes, dtypes or device, or of the module tree, `forward` raises `MismatchError`. Autograd is not recorded.
    """

    _xdit_context: RankContext
    _xdit_runner: RankRunner
    _xdit_buffers: BufferGuards

    def __init__(self, context: RankContext, runner: RankRunner) -> None:
        Shadow.__init__(self, context.model)
        self.__dict__["_xdit_runner"], self.__dict__["_xdit_context"] = runner, context
        self.__dict__["_xdit_buffers"] = BufferGuards(context.model, runner.program)

    @property
    def program(self) -> Program:
        """The program of this rank; under PipeFusion that of all ranks, in which `pipefusion` counts patches."""
        return self._xdit_runner.program

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks as modules without parameters, so that compiling each once compiles all layers."""
        return self._xdit_runner.bodies

    def reset(self) -> None:
        """Free CUDA graphs, which `torch.distributed.destroy_process_group` would wait for; forward records anew."""
        self._xdit_runner.forget()

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        runner = self._xdit_runner
        failure: MismatchError | None = None
        try:
            inputs, weights = runner.bind(args, kwargs)
            self._xdit_buffers.check()
        except MismatchError as error:
            failure = error
        refusal = {} if failure is None else {"the program": failure_text(failure)}

        def details() -> dict[str, str]:
            return call_facts(self._xdit_signature, args, kwargs, guarded([runner.program])) | refusal

        try:
            mine, later = (digest(refusal), False) if refusal else runner.vote(inputs)
            agree(self._xdit_context.communicator, mine, details, later=later)
        except MismatchError as mismatch:
            raise mismatch from failure
        if failure is not None:
            raise failure
        return runner.run(inputs, weights, args, kwargs)

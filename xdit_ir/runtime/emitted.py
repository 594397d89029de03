"""`emit`: the module that runs one rank's program in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xdit_ir.emission.checkpoint import Loading
from xdit_ir.emission.codegen import EmittedBody
from xdit_ir.emission.execution import Execution
from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Program
from xdit_ir.parallel import Parallel
from xdit_ir.pipelined.pipe_runner import PipelineRunner
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.runtime.runner import Runner, build
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import agree, call_facts, digest, failure_text, guarded


def emit(
    parallel: Parallel,
    model: nn.Module,
    device: torch.device | str | None = None,
    execution: Execution | None = None,
    loading: Loading | None = None,
) -> Emitted:
    """The module of this process's rank. Collective: every rank of the job calls it for the same program.

    Args:
        model: holds the weights, which are used by reference; it is not changed.
        device: where to run; the model must be there. Default: where the model is.
        execution: how to run it; default: eagerly, with a handshake.
        loading: where weights come from; default: by reference from the model.

    Raises:
        ParallelizeError: the job has another number of processes than the program has ranks.
        MismatchError: the weights are not loaded, or not those of the program; or the ranks differ.
    """
    execution, loading = execution or Execution(), loading or Loading()
    where = loading.device(model, device)
    execution.check(where)
    communicator = Communicator(parallel.mesh, where, handshake=execution.handshake)
    traffic = StepQueue(communicator) if parallel.pipeline is not None else None
    runner = build(communicator, model, lambda: parallel, execution, loading.store(model, where), traffic)
    return Emitted(model, runner, communicator)


class Emitted(Shadow):
    """Runs this rank's part of a program, with the weights, attributes and `forward` signature of `original`.

    Weights are looked up by name at every call, so loading others into the original takes effect; after a change of
    their shapes, dtypes or device, or of the module tree, `forward` raises `MismatchError`. Autograd is not recorded.
    """

    def __init__(self, original: nn.Module, runner: Runner | PipelineRunner, communicator: Communicator) -> None:
        super().__init__(original)
        self.__dict__["_xdit_runner"], self.__dict__["_xdit_communicator"] = runner, communicator

    @property
    def program(self) -> Program:
        """The program of this rank; under PipeFusion that of all ranks, in which `pipefusion` counts patches."""
        runner: Runner | PipelineRunner = self._xdit_runner
        return runner.program

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks as modules without parameters, so that compiling each once compiles all layers."""
        runner: Runner | PipelineRunner = self._xdit_runner
        return runner.bodies

    def reset(self) -> None:
        """Free CUDA graphs, which `torch.distributed.destroy_process_group` would wait for; forward records anew."""
        runner: Runner | PipelineRunner = self._xdit_runner
        runner.forget()

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        runner: Runner | PipelineRunner = self._xdit_runner
        failure: MismatchError | None = None
        try:
            inputs, weights = runner.bind(args, kwargs)
        except MismatchError as error:
            failure = error
        refusal = {} if failure is None else {"the program": failure_text(failure)}

        def details() -> dict[str, str]:
            return call_facts(self._xdit_signature, args, kwargs, guarded([runner.program])) | refusal

        try:
            mine, later = (digest(refusal), False) if refusal else runner.vote(inputs)
            agree(self._xdit_communicator, mine, details, later=later)
        except MismatchError as mismatch:
            raise mismatch from failure
        if failure is not None:
            raise failure
        return runner.run(inputs, weights, args, kwargs)

"""`emit`: the module that runs one rank's program in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.binder import BufferGuards
from xdit_ir.deferral.gradients import gradient_refusal
from xdit_ir.emission.code_writer import EmittedBody
from xdit_ir.emission.context import RunOptions, on_all_ranks
from xdit_ir.emission.parts import not_saved, without_effect
from xdit_ir.emission.state import ModelWeights
from xdit_ir.errors import GradientError, MismatchError
from xdit_ir.ir.program import Program
from xdit_ir.parallel import Parallel
from xdit_ir.runtime.build import RunnerFactory
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.transport.distributed import Communicator
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
    with on_all_ranks(parallel.mesh, options):
        found = options.loading.device(model, device)
    return Emitted(model, lambda: _built(parallel, model, found, options))


@dataclass(frozen=True, eq=False)
class _Built:
    """What is made anew after a failure of any rank."""

    factory: RunnerFactory
    runner: RankRunner

    @property
    def communicator(self) -> Communicator:
        """Of all ranks."""
        return self.factory.context.communicator


def _built(parallel: Parallel, model: nn.Module, device: torch.device, options: RunOptions) -> _Built:
    factory = RunnerFactory(options.context(model, parallel.mesh, device))
    with factory.context.communicator.working():
        return _Built(factory, factory.build(lambda: parallel)[1])


class Emitted(Shadow):
    """Runs this rank's part of a program, with the weights, attributes and `forward` signature of the model.

    Weights are looked up by name at every call, so loading others into the model takes effect; after a change of
    their shapes, dtypes or device, or of the module tree, `forward` raises `MismatchError`. No gradients are recorded:
    who needs one gets a `GradientError`.
    """

    _xdit_make: Callable[[], _Built]
    _xdit_built: _Built
    _xdit_buffers: BufferGuards

    def __init__(self, model: nn.Module, make: Callable[[], _Built]) -> None:
        Shadow.__init__(self, model)
        self.__dict__["_xdit_make"], self.__dict__["_xdit_built"] = make, make()
        self.__dict__["_xdit_buffers"] = BufferGuards(model, self._xdit_runner.program)

    @property
    def _xdit_runner(self) -> RankRunner:
        return self._xdit_built.runner

    @property
    def program(self) -> Program:
        """The program of this rank; under PipeFusion that of all ranks, in which `pipefusion` counts patches."""
        return self._xdit_runner.program

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks as modules without parameters, so that compiling each once compiles all layers."""
        return self._xdit_runner.bodies

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's; raises `MismatchError` where this holds the weights."""
        if self._xdit_holds:
            raise MismatchError(without_effect("a state dict was loaded into"))
        return Shadow.load_state_dict(self, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; raises `MismatchError` where this holds the weights, as nothing would be saved."""
        if self._xdit_holds:
            raise MismatchError(not_saved())
        return Shadow.state_dict(self, *args, **kwargs)

    @property
    def _xdit_holds(self) -> bool:
        return not isinstance(self._xdit_built.factory.context.store, ModelWeights)

    def reset(self) -> None:
        """Free CUDA graphs, which `torch.distributed.destroy_process_group` would wait for, and give back process
        groups, on every rank; forward makes what it needs anew."""
        self._xdit_runner.forget()
        self._xdit_built.communicator.close()

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._xdit_built.communicator.ended:
            self._xdit_runner.forget()
            self.__dict__["_xdit_built"] = self._xdit_make()
        built = self._xdit_built
        with built.communicator.working():
            return self._xdit_call(built, args, kwargs)

    def _xdit_call(self, built: _Built, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        runner, communicator = built.runner, built.communicator
        try:
            if (gradients := gradient_refusal(lambda: self._xdit_signature, args, kwargs)) is not None:
                raise gradients
            inputs, weights = runner.bind(args, kwargs)
            self._xdit_buffers.check()
        except (GradientError, MismatchError) as failure:
            refusal = {"the program": failure_text(failure)}
            facts = self._xdit_facts(runner, args, kwargs) | refusal
            try:
                agree(communicator, digest(refusal), lambda: facts)
            except MismatchError as mismatch:
                raise mismatch from failure
            raise communicator.agreed(failure) from None
        built.factory.agreement.call(runner, inputs, weights, lambda: self._xdit_facts(runner, args, kwargs))
        return runner.run(inputs, weights, args, kwargs)

    def _xdit_facts(self, runner: RankRunner, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
        return call_facts(self._xdit_signature, args, kwargs, guarded([runner.program]))

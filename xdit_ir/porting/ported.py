"""A module that runs in parallel and is traced at its first forward."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.api import ParallelProgram, TracedProgram, trace
from xdit_ir.capture.inputs import bind_arguments
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.emission.checkpoint import Loading, WeightStore
from xdit_ir.emission.execution import Execution, Tensors
from xdit_ir.errors import MismatchError, ParallelizeError
from xdit_ir.ir.mesh import BATCH, TIME, Mesh
from xdit_ir.pipelined.pipe_runner import PipelineRunner
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.porting.settings import ModelSettings
from xdit_ir.runtime.pairing import Pairing, materialized
from xdit_ir.runtime.runner import Runner, build
from xdit_ir.runtime.shadow import Shadow
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import agree, agree_contents, call_facts, call_tensors, digest, fact, guarded

LIMIT = 32  # specialisations kept per module, the most recently used ones
Mode = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Specialisation:
    """What runs calls of some kind, and what it was made for besides inputs and weights."""

    mode: Mode
    settings: ModelSettings
    runner: Runner | PipelineRunner


@dataclass(eq=False)
class Specialisations:
    """What a ported module has made so far; `made` with the most recently used first."""

    mesh: Mesh
    options: dict[str, Any]
    execution: Execution
    loading: Loading
    communicator: Communicator | None = None
    store: WeightStore | None = None
    pairing: Pairing | None = None
    traffic: StepQueue | None = None
    made: list[Specialisation] = field(default_factory=list)
    last: ParallelProgram | None = None


def _moving(name: str) -> Any:
    """A method that moves the module: by the original's own, unless some of it is on the meta device and stays there,
    because the port holds the weights."""

    def method(self: Ported, /, *args: Any, **kwargs: Any) -> Ported:
        if self._holds:
            getattr(nn.Module, name)(self, *args, **kwargs)
        else:
            getattr(Shadow, name)(self, *args, **kwargs)
        return self

    return functools.wraps(getattr(nn.Module, name))(method)


class Ported(Shadow):
    """`original`, parallel: the same state, attributes, class and `forward` signature.

    Reloaded weights take effect at once. Weights of other shapes, dtypes or device, replaced submodules, changed plain
    attributes and hooks are noticed and the model is traced anew, so that adapters may come, go and change their scale.
    After a change of anything else that forward reads (globals, objects without a `__dict__`), call `reset`.
    """

    def __init__(self, original: nn.Module, specialisations: Specialisations) -> None:
        super().__init__(original)
        self.__dict__["_xdit"] = specialisations

    @property
    def program(self) -> ParallelProgram | None:
        """The parallel program of the last forward; None before the first."""
        return self._made.last

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The parallel programs of all specialisations, the most recently used first."""
        return tuple(cast(ParallelProgram, one.runner.parallel) for one in self._made.made)

    def reset(self) -> None:
        """Forget all specialisations, on every rank, so that the next forward traces the model anew.

        Under `cuda_graph`, call it before `torch.distributed.destroy_process_group`, which would wait for the graphs.
        """
        for one in self._made.made:
            one.runner.forget()
        self._made.made.clear()
        self._made.last = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ported:
        made = self._made
        fresh = Specialisations(made.mesh, dict(made.options), made.execution, made.loading)
        return Ported(copy.deepcopy(self._xdit_original, memo), fresh)

    def __getattr__(self, name: str) -> Any:
        """`device` of a port that holds its weights itself is where it runs: its original is on the meta device."""
        found = Shadow.__getattr__(self, name)
        return self._made.loading.device(self._xdit_original) if name == "device" and self._holds else found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Ported:
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(torch.empty_like(tensor, device="cpu")[:0]).dtype) if tensor.is_meta else fn(tensor)

        self._xdit_original._apply(apply if self._holds else fn, recurse)  # type: ignore[no-untyped-call]
        return self

    to = _moving("to")
    cuda = _moving("cuda")
    cpu = _moving("cpu")

    @property
    def _holds(self) -> bool:
        """Whether weights are elsewhere than in the original, which may be on the meta device."""
        return self._made.loading.holds

    @property
    def _made(self) -> Specialisations:
        made: Specialisations = self.__dict__["_xdit"]
        return made

    def _xdit_forward(self, /, *args: Any, **kwargs: Any) -> Any:
        made = self._made
        if made.pairing is not None:
            args, kwargs = materialized((args, kwargs))
        device = made.loading.device(self._xdit_original, inputs=(*args, *kwargs.values()))
        if made.communicator is None or made.communicator.device != device:
            made.execution.check(device)
            made.communicator = Communicator(made.mesh, device, handshake=made.execution.handshake)
            made.pairing = None
            made.store = made.loading.store(self._xdit_original, device)
            made.traffic = StepQueue(made.communicator) if made.mesh.size((TIME,)) > 1 else None
        mode = self._mode(device)
        found = self._find(mode, args, kwargs)

        def facts() -> dict[str, str]:
            return self._facts(mode, args, kwargs)

        if made.communicator.control is not None:
            mine, later = found[0].vote(found[1]) if found is not None else (digest(facts()), False)
            state = {"the program of this call": "made before" if found is not None else "not made yet"}
            agree(made.communicator, mine, lambda: facts() | state, later=later)
        if found is None:
            runner = self._specialise(made.communicator, mode, args, kwargs)
            found = runner, *runner.bind(args, kwargs)
        runner, inputs, weights = found
        made.last = cast(ParallelProgram, runner.parallel)
        if (
            made.pairing is not None
            and isinstance(runner, Runner)
            and runner.parallel.pair_calls
            and not runner.program.signature.effects
        ):
            return made.pairing.call(runner, inputs, weights)
        return runner.run(inputs, weights, args, kwargs)

    def _mode(self, device: torch.device) -> Mode:
        """What a trace depends on besides arguments and weights."""
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return device, self._xdit_original.training, cast

    def _find(
        self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Runner | PipelineRunner, Tensors, Tensors] | None:
        """The specialisation for a call, moved to the front, with its inputs and weights."""
        made = self._made.made
        for place, one in enumerate(made):
            if one.mode == mode:
                try:
                    inputs, weights = one.runner.bind(args, kwargs)
                except MismatchError:
                    continue
                if one.settings.unchanged():
                    made.insert(0, made.pop(place))
                    return one.runner, inputs, weights
        return None

    def _facts(self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
        """This call as text; contents only of inputs that some specialisation was made for."""
        made = self._made
        contents = guarded(one.runner.program for one in made.made)
        facts = call_facts(self._xdit_signature, args, kwargs, contents)
        options = {"the degrees of port": fact(made.options), "training mode and autocast": fact(mode[1:])}
        return facts | options

    def _specialise(
        self, communicator: Communicator, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Runner | PipelineRunner:
        def make() -> ParallelProgram:
            named = bind_arguments(self._xdit_signature, args, kwargs, MismatchError)
            example = pytree.tree_map_only(Deferred, materialize, tuple(args) if args and not kwargs else named)
            return _parallelized(trace(self._xdit_original, example), made.options)

        made, settings = self._made, ModelSettings(self._xdit_original)
        agree_contents(communicator, call_tensors(self._xdit_signature, args, kwargs))
        runner = build(communicator, self._xdit_original, make, made.execution, made.store, made.traffic)
        if isinstance(runner, Runner) and runner.parallel.pair_calls and made.pairing is None:
            made.pairing = Pairing(communicator)
        if len(made.made) >= LIMIT:
            del made.made[LIMIT - 1 :]
            warnings.warn(
                f"more than {LIMIT} specialisations: forward is traced again and again because of changes in "
                f"{_changing(made.made[0].runner, runner)}; pass what changes at every step as a tensor",
                stacklevel=2,
            )
        made.made.insert(0, Specialisation(mode, settings, runner))
        return runner


def _parallelized(traced: TracedProgram, options: Mapping[str, Any]) -> ParallelProgram:
    """`cfg` divides the batch, or, where it cannot be divided, two calls."""
    try:
        return traced.parallelize(**options)
    except ParallelizeError:
        if options[BATCH] != 2:
            raise
        return traced.parallelize(**options, pair_calls=True)


def _changing(last: Runner | PipelineRunner, new: Runner | PipelineRunner) -> str:
    """The inputs in which two specialisations differ."""
    names = [name for name, value in new.facts.items() if last.facts.get(name) != value]
    return ", ".join(name for name in names if not name.startswith("the ")) or "the model"

"""One rank of a pipeline in this process: a call runs its stages for all patches and returns what is not there yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.binder import InputBinder
from xdit_ir.capture.effects import apply_effects
from xdit_ir.capture.inputs import bind_arguments
from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.deferral.gradients import without_gradients
from xdit_ir.deferral.recorded import Numbers
from xdit_ir.emission.code_writer import EmittedBody
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Execution, Tensors, as_normal_tensor, plain_modes
from xdit_ir.emission.state import ModelWeights
from xdit_ir.errors import MismatchError, ParallelizeError
from xdit_ir.ir.effects import ITSELF
from xdit_ir.ir.graphs import all_graphs, results_of
from xdit_ir.ir.program import BYTES_IN_FULL, SPEC, Program, left_tensors
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.pipelined.pipe_pass import PipelinePass, outputs_of
from xdit_ir.pipelined.requests import NEW, CallPosition
from xdit_ir.pipelined.stage_code import RankCode
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.transport.contents import Contents
from xdit_ir.transport.handshake import Facts, agree_contents, compare_later, digest

COMPILED_FP8 = (8, 9)


class PipelineRunner:
    """Runs one rank's stages in this process; made together by all ranks. `apart`: parts of `cfg` run different calls.

    A call expects all messages of its pass, then runs this rank's stages patch by patch and sends on. The first stage
    waits for nothing but the last outputs of the patch that it runs, so that passes follow each other without a gap.
    """

    def __init__(self, context: RankContext, tasks: RankTasks, queue: StepQueue, facts: Facts, *, apart: bool) -> None:
        self.facts, self._digest, self.queue = facts, digest(facts), queue
        self.tasks, self.pipeline = tasks, tasks.pipeline
        self.program, self.device = tasks.pipeline.program, context.device
        self._follow = tasks.pipeline.patches > 1 and bool(tasks.latents)  # calls may be steps of a request
        self.channels = queue.channels.open(tasks, apart=apart)
        self._model, self._parameters = context.model, context.parameters
        self._binder = InputBinder(context.parameters, self.program)
        self._left = left_tensors(self.program.signature)
        self._outputs = [value.meta[SPEC] for value in results_of(self.program.graph)]
        self.weights = self.pipeline.weights_of(context.rank)
        stored = self.pipeline.stored_of(context.rank)
        self._whole = [place for place, name in enumerate(self.weights) if name not in stored]
        if stored and context.communicator.line is not None:
            agree_contents(context.communicator, context.store.originals(self.weights, self.program.state, stored))
        self._weights = context.store.take(self.weights, self.program.state, stored)
        self.places = self._weights.places
        store = context.store
        self._held = store.held(self.program.state) if isinstance(store, ModelWeights) else None
        self._code = RankCode(tasks, context)

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks of all stages and patches."""
        return self._code.bodies

    @property
    def execution(self) -> str:
        """How it runs, and what does not run as it should."""
        return self._code.execution

    @property
    def cache(self) -> None:
        """How often a step cache was of use: there is none."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """Inputs and weights for one call; raises `MismatchError` if the program was not made for them."""
        return self._binder(args, kwargs), self._weights.fetch()

    def forget(self) -> None:
        """Free what was recorded."""
        self._code.memories.forget()

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call, and whether that may be compared later."""
        position, voted = self._position(self._latents(inputs)), self.queue.voted
        self.queue.voted = None if position.synchronous else self._digest
        found = digest({"the program": str(self._digest), "the call": str(position)})
        return found, position.kind != NEW and voted == self._digest and not position.synchronous

    def told(self, inputs: Tensors) -> Facts:
        """What that is, besides arguments and program, for ranks that do not agree."""
        position = self._position(self._latents(inputs))
        return {"the place of the call": f"{position.kind}, call {position.place} of its step"}

    def held(self, weights: Tensors) -> tuple[Sequence[str], Tensors]:
        """Names and tensors of all weights that are here: of one's own stages, and of those that others run, which may
        not be another model's; not those of which each rank has another part."""
        if self._held is None:
            return [self.weights[place] for place in self._whole], [weights[place] for place in self._whole]
        try:
            found = zip(self._held.names, self._held.fetch(), strict=True)
        except MismatchError:  # those of other stages may be gone
            return self.weights, weights
        here = {name: x for name, x in found if not x.is_meta}
        return list(here), list(here.values())

    def plain(self, inputs: Tensors) -> dict[str, torch.Tensor | Numbers]:
        """Those inputs, by name, that do not stand for something; of the others what results were combined with since
        the last call."""
        found: dict[str, torch.Tensor | Numbers] = {}
        for name, x in self._named(inputs):
            found |= x.value.combined(name, self.queue.known) if isinstance(x, Deferred) else {name: x}
        return found

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result, of which the tensors that it makes are `Deferred`; what forward leaves in caches is left
        in the arguments, which waits for those of its results that it leaves there."""
        with plain_modes(self.device.type):
            try:
                outputs = self._pass(inputs, weights)
                left = [materialize(x) if place in self._left else x for place, x in enumerate(outputs)]
            except BaseException:
                self.queue.abandon()
                raise
        if self.program.signature.effects:
            named = bind_arguments(self._parameters, args, kwargs, MismatchError)
            apply_effects(self.program.signature, left, named, self._model)
        return build_output(self.program.signature, without_gradients(outputs, weights))

    def _pass(self, inputs: Tensors, weights: Tensors) -> list[torch.Tensor]:
        latents, requests = self._latents(inputs), self.queue.requests
        position = self._position(latents)
        waits = any(isinstance(x, Deferred) and name not in latents for name, x in self._named(inputs))
        self.queue.turn_to(self, whole=position.synchronous or waits)
        made = self._enter(position, inputs, weights)
        made.issue()
        limit = self.pipeline.issue_order(0, made.number + 1, 0) if len(self.tasks.stages) > 1 else math.inf
        self.queue.run(before=limit)
        self.channels.post_sent(limit)
        results = iter(outputs_of(made, self._outputs))
        given = dict(self._named(inputs))
        outputs = [next(results) if name is None else given[name] for name in self.tasks.returned]
        pairs = zip(outputs, self.tasks.cuts, strict=True)
        divided = [x for x, cut in pairs if cut is not None and isinstance(x, Deferred)]
        requests.returned(made.number, divided)
        finished = self.queue.remember(made.inputs, at_once=len(self.tasks.stages) == 1)
        if finished and self.queue.communicator.line is not None:
            compare_later(self.queue.communicator, Contents(finished), what="latents", calls=2)
        return outputs

    def _position(self, latents: Mapping[str, torch.Tensor]) -> CallPosition:
        """To which step of which request a call with these latents belongs."""
        if not self._follow:
            return CallPosition(NEW, 0, synchronous=self.pipeline.patches > 1)
        return self.queue.requests.position(latents, self.tasks.latents, self, self.pipeline.warmup_steps)

    def _enter(self, position: CallPosition, inputs: Tensors, weights: Tensors) -> PipelinePass:
        """Begin a call: its request has memory where this rank's half runs it."""
        requests = self.queue.requests
        branch = requests.enter(position, self._latents(inputs), self)
        requests.number += 1
        half = (position.place if self._follow else requests.number) % len(self.channels.returns)
        if half == self.channels.half and branch.memory is None:
            branch.memory = self._code.memories.lend(branch)
        given = {name: self._kept(x) for name, x in self._named(inputs)}
        named = dict(zip(self.weights, weights, strict=True))
        number, code, channels = requests.number, self._code, self.channels
        return PipelinePass(number, half, position.synchronous, branch, given, named, code, channels, self.queue)

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """An input as it is now, whatever the caller does to it before all that was put off is done."""
        if isinstance(x, Deferred):
            return Deferred(x.value)
        return x.clone() if len(self.tasks.stages) > 1 else as_normal_tensor(x)

    def _named(self, inputs: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.tasks.inputs, inputs, strict=True)

    def _latents(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self._named(inputs) if name in self.tasks.latents}


def check_pipeline(program: Program, execution: Execution, device: torch.device) -> None:
    """Raise `ParallelizeError` for what a pipeline cannot do, or not on this device."""
    if execution.compile and device.type == "cuda" and _has_fp8(program):
        capability = torch.cuda.get_device_capability(device)
        if capability < COMPILED_FP8:
            raise ParallelizeError(
                f"kv_cache_dtype='fp8_e4m3' in compiled code needs compute capability {COMPILED_FP8}, and this GPU "
                f"has {capability}; nearest legal: kv_cache_dtype='bfloat16', or mode='eager'"
            )
    if any(effect.path[0].key == ITSELF for effect in program.signature.effects):
        raise ParallelizeError(
            "pipefusion > 1: forward writes into the model, of which each stage has a part; use ulysses or ring"
        )
    if execution.transport == "peer":
        raise ParallelizeError("transport='peer' does not exist for pipefusion > 1; leave it out")


def _has_fp8(program: Program) -> bool:
    """Whether something is kept in 8 bits between steps."""
    nodes = (node for _, graph, _ in all_graphs(program) for node in graph.nodes)
    return any(BYTES_IN_FULL in node.meta and node.meta[SPEC].dtype.itemsize == 1 for node in nodes)

"""One rank of a pipeline in this process: a call runs its stages for all patches and returns what is not there yet."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.inputs import InputBinder
from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.emission.checkpoint import WeightStore, rank_weights
from xdit_ir.emission.codegen import Code, EmittedBody, generate, slot_specs, state_names
from xdit_ir.emission.execution import Execution, Tensors, as_normal_tensor, compile_body, plain_modes
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.graphs import results_of
from xdit_ir.ir.interpret import constant_on
from xdit_ir.ir.mesh import BATCH
from xdit_ir.ir.program import CONSTANT, SPEC, Program, TensorSpec
from xdit_ir.parallel import Parallel
from xdit_ir.passes.base import run_passes
from xdit_ir.pipefusion.rank_tasks import RankTasks, StageTask
from xdit_ir.pipelined.memory import Memories, zeros
from xdit_ir.pipelined.pipe_pass import PipelinePass, envelope, outputs_of
from xdit_ir.pipelined.requests import NEW, CallPosition
from xdit_ir.pipelined.schedule import StageRun, items_of
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import digest
from xdit_ir.transport.messages import LostError


@dataclass(frozen=True, eq=False)
class _Runnable:
    """A stage's work with its code; `state` names its weights and constants in the order of arguments."""

    work: StageTask
    code: Code
    state: tuple[str, ...]
    slots: tuple[str, ...]

    def __call__(self, inputs: Tensors, state: Tensors) -> Sequence[torch.Tensor]:
        """Run it; `state` with the buffers behind it."""
        outputs: Sequence[torch.Tensor] = self.code.run.forward(*inputs, *state)
        return outputs


class PipelineRunner:
    """Runs one rank's stages in this process; made together by all ranks.

    A call expects all messages of its pass, then runs this rank's stages patch by patch and sends on. The first stage
    waits for nothing but the last outputs of the patch that it runs, so that passes follow each other without a gap.
    """

    def __init__(
        self,
        parallel: Parallel,
        model: nn.Module,
        communicator: Communicator,
        facts: Mapping[str, str],
        execution: Execution,
        work: RankTasks,
        traffic: StepQueue,
        store: WeightStore | None = None,
    ) -> None:
        self.parallel, self.facts, self.digest = parallel, facts, digest(facts)
        self.pipeline, self.work, self.traffic = work.pipeline, work, traffic
        self.program, self.device = work.pipeline.program, communicator.device
        self.channels = traffic.channels.open(self.pipeline, apart=parallel.pair_calls)
        self._half = self.pipeline.mesh.index(communicator.rank, (BATCH,)) if parallel.pair_calls else 0
        self._binder = InputBinder(inspect.signature(model.forward), self.program)
        self._inputs = [node.name for node in self.program.graph.nodes if node.op == "placeholder"]
        self._specs = [value.meta[SPEC] for value in results_of(self.program.graph)]
        self.weights = self.pipeline.weights_of(communicator.rank)
        self._weights = rank_weights(model, store, self.weights, self.program.state, self.device)
        self._runnables = {
            key: self._runnable(each, communicator, execution) for key, each in (*work.displaced.items(), *_all(work))
        }
        self._constants = {
            name: constant_on(self.program, name.removeprefix(f"{CONSTANT}."), self.device)
            for each in self._runnables.values()
            for name in each.state
            if name.startswith(f"{CONSTANT}.")
        }
        self._memories = Memories(self._buffer_types(), self.device)
        self._pool = torch.cuda.graph_pool_handle() if execution.cuda_graph else None
        self._types = [work.result_types(patch) for patch in range(self.pipeline.patches)]
        if execution.compile:
            for each in self._runnables.values():
                for body in each.code.bodies.values():
                    compile_body(body.module)

    def _runnable(self, work: StageTask, communicator: Communicator, execution: Execution) -> _Runnable:
        lowered = run_passes(work.program, execution.passes(self.device))
        code = generate(lowered, communicator, self.device)
        weights, constants = state_names(work.program)
        return _Runnable(work, code, (*weights, *constants), tuple(slot_specs(work.program)))

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks of all stages and patches."""
        found: dict[str, EmittedBody] = {}
        for (stage, patch), each in self._runnables.items():
            where = f"stage {stage}, {'all patches' if patch is None else f'patch {patch}'}"
            found |= {f"{name} ({where})": body for name, body in each.code.bodies.items()}
        return found

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """Inputs and weights for one call; raises `MismatchError` if the program was not made for them."""
        return self._binder(args, kwargs), self._weights.fetch()

    def forget(self) -> None:
        """Free what was recorded."""
        self._memories.forget()

    def moment(self, inputs: Tensors) -> CallPosition:
        """To which step of which request a call with these inputs belongs."""
        if self.pipeline.patches == 1:
            return CallPosition(NEW, 0, synchronous=False)
        return self.traffic.requests.moment(self._latents(inputs), self.work.latents, self, self.pipeline.warmup_steps)

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call, and whether that may be compared later."""
        moment = self.moment(inputs)
        found = digest({"the program": str(self.digest), "the call": str(moment)})
        return found, moment.kind != NEW and self.traffic.requests.number > 0

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result, whose tensors are `Deferred`."""
        with plain_modes(self.device.type):
            try:
                outputs = self._pass(inputs, weights)
            except BaseException as error:
                self._give_up(error)
                raise
        return build_output(self.program.signature, outputs)

    def _pass(self, inputs: Tensors, weights: Tensors) -> list[Deferred]:
        moment, latents, traffic = self.moment(inputs), self._latents(inputs), self.traffic
        wanted_whole = any(isinstance(x, Deferred) and name not in latents for name, x in self._named(inputs))
        if moment.synchronous or wanted_whole or traffic.last is not self:
            traffic.run()
        traffic.last = self
        lane = traffic.requests.enter(moment, latents, self)
        traffic.requests.number += 1
        half = (moment.place if self.pipeline.patches > 1 else traffic.requests.number) % len(self.channels.returns)
        mine = half == self._half
        if mine and lane.memory is None:
            lane.memory = self._memories.lend(lane)
        given = {name: self._kept(x) for name, x in self._named(inputs)}
        state = dict(zip(self.weights, weights, strict=True)) | self._constants
        made = PipelinePass(traffic.requests.number, half, lane, given, state, self._run, traffic)
        stages = self.work.stages if mine else ()
        items = items_of(self.pipeline, made.number, stages, synchronous=moment.synchronous)
        self._expect(made, items, synchronous=moment.synchronous)
        traffic.put_off(made, items)
        limit = self.pipeline.issue_order(0, made.number + 1, 0) if len(self.work.stages) > 1 else math.inf
        traffic.run(before=limit)
        for channel in (*filter(None, self.channels.between), *self.channels.returns):
            channel.post_sent(limit)
        types, cuts = self._types, self.work.cuts
        maker, synchronous = traffic.requests, moment.synchronous
        outputs = outputs_of(made, types, cuts, self._specs, self.device, maker, synchronous=synchronous)
        divided = (x for x, cut in zip(outputs, self.work.cuts, strict=True) if cut is not None)
        traffic.requests.returned(made.number, next(divided, None))
        for x in traffic.previous:
            materialize(x)  # long there, since what was made of it is: so nothing is remembered for more than two steps
        traffic.previous = [x for x in given.values() if isinstance(x, Deferred)]
        return outputs

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """An input as it is now, whatever the caller does to it before all that was put off is done."""
        if isinstance(x, Deferred):
            return Deferred(x.value)
        return x.clone() if len(self.work.stages) > 1 else as_normal_tensor(x)

    def _expect(self, made: PipelinePass, items: Sequence[StageRun], *, synchronous: bool) -> None:
        """Prepare for all messages of a pass."""
        for item in items:
            channel = self.channels.between[item.stage]
            message = envelope(self._of(item).work.receives)
            if channel is not None and message is not None:
                made.arrivals[item.stage, item.patch] = channel.expect(message, item.issue_order - 1)
        for patch in (None,) if synchronous else range(self.pipeline.patches):
            if not (self.channels.is_last and made.half == self._half):
                message = envelope(self._result_types(patch))
                if message is None:
                    made.results[patch] = []
                else:
                    due = self.pipeline.issue_order(self.pipeline.stages - 1, made.number, patch or 0)
                    made.returns[patch] = self.channels.returns[made.half].expect(message, due)

    def _result_types(self, patch: int | None) -> list[Any]:
        patches = range(self.pipeline.patches) if patch is None else (patch,)
        return [spec for p in patches for spec in self._types[p]]

    def _run(self, made: PipelinePass, item: StageRun) -> None:
        """Run a stage for a patch, or for all of them, and send what it gives."""
        each = self._of(item)
        arrival = made.arrivals.pop((item.stage, item.patch), None)
        received = arrival.take() if arrival is not None else [zeros(spec, self.device) for spec in each.work.receives]
        given = [made.given(need, self.work.latents) for need in each.work.needs]
        given += [received[one] if isinstance(one, int) else made.held.pop(one) for one in each.work.feed]
        state = [made.weights[name] for name in each.state]
        assert made.lane.memory is not None
        run = made.lane.memory.run((item.stage, item.patch), each.slots, each, self._pool)
        self._deliver(made, item, run(given, state))

    def _deliver(self, made: PipelinePass, item: StageRun, outputs: Sequence[torch.Tensor]) -> None:
        """Hand on what a stage gave: to the next one, to a later one of this rank, or as results to all ranks."""
        work = self._of(item).work
        sent = len(work.sends)
        made.held |= dict(zip(work.carried_out, outputs[sent:], strict=False))
        if sent:
            channel, message = self.channels.between[item.stage + 1], envelope(work.sends)
            assert channel is not None
            if message is not None:
                channel.send(message, outputs[:sent])
        if item.stage == self.pipeline.stages - 1:
            made.results[item.patch] = list(outputs)
            message = envelope(work.results)
            if message is not None:
                self.channels.returns[made.half].send(message, outputs)

    def _give_up(self, error: BaseException) -> None:
        """Forget the request. Unless others are gone, send what they expect of this pass, whatever is in it, so that
        no message of it is left over; that the ranks are not of one mind is found at their next call."""
        for item, made in self.traffic.abandon():
            if isinstance(error, LostError) or not isinstance(error, Exception) or not isinstance(made, PipelinePass):
                continue
            arrival = made.arrivals.pop((item.stage, item.patch), None)
            if arrival is not None:
                arrival.take()
            work = self._of(item).work
            self._deliver(made, item, [zeros(spec, self.device) for spec in (*work.sends, *work.results)])

    def _of(self, item: StageRun) -> _Runnable:
        return self._runnables[item.stage, item.patch]

    def _buffer_types(self) -> dict[int, dict[str, TensorSpec]]:
        found: dict[int, dict[str, TensorSpec]] = {stage: {} for stage in self.work.stages}
        for (stage, _), each in self._runnables.items():
            for name, spec in slot_specs(each.work.program).items():
                if spec is not None:
                    found[stage].setdefault(name, spec)
        return found

    def _named(self, inputs: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self._inputs, inputs, strict=True)

    def _latents(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self._named(inputs) if name in self.work.latents}


def _all(work: RankTasks) -> Iterator[tuple[tuple[int, int | None], StageTask]]:
    if work.pipeline.patches > 1:
        yield from (((stage, None), each) for stage, each in work.synchronous.items())


def check_pipeline(program: Program, execution: Execution) -> None:
    """Raise `ParallelizeError` for what a pipeline cannot do."""
    if program.signature.effects:
        raise ParallelizeError("pipefusion > 1: forward writes into what it is given (a cache); use ulysses or ring")
    if execution.transport == "peer":
        raise ParallelizeError("transport='peer' does not exist for pipefusion > 1; leave it out")

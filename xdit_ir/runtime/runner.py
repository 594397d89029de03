"""One rank's program, ready to run: code, weights, constants, and the check of inputs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.effects import apply_effects
from xdit_ir.capture.inputs import InputBinder, bind_arguments
from xdit_ir.capture.outputs import build_output
from xdit_ir.emission.checkpoint import WeightStore, rank_weights
from xdit_ir.emission.codegen import EmittedBody, communications, generate, state_names
from xdit_ir.emission.execution import Execution, Recording, Tensors, as_normal_tensor, compile_body, plain_modes
from xdit_ir.emission.state import Weights
from xdit_ir.errors import MismatchError
from xdit_ir.ir.graphs import results_of
from xdit_ir.ir.interpret import constant_on
from xdit_ir.ir.program import CONSTANT, SPEC, TensorSpec
from xdit_ir.parallel import Parallel
from xdit_ir.passes.base import run_passes
from xdit_ir.pipefusion.rank_tasks import RankTasks
from xdit_ir.pipelined.pipe_runner import PipelineRunner, check_pipeline
from xdit_ir.pipelined.schedule import verify_schedule
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.transport.distributed import Communicator, peers_reachable
from xdit_ir.transport.handshake import TRACE, agree, contents_hash, digest, fact, failure_text


class Runner:
    """Runs one rank's program in this process; making one is collective, see `build`.

    `digest` is equal on two ranks only if they run the same program, for the same guarded values.
    """

    def __init__(
        self,
        parallel: Parallel,
        model: nn.Module,
        communicator: Communicator,
        facts: Mapping[str, str],
        execution: Execution,
        store: WeightStore | None = None,
    ) -> None:
        self.parallel, self.facts, self.digest = parallel, facts, digest(facts)
        self.program, self.device = parallel.rank(communicator.rank), communicator.device
        weights, constants = state_names(self.program)
        self._weights = rank_weights(model, store, weights, self.program.state, self.device)
        self._constants = [
            constant_on(self.program, name.removeprefix(f"{CONSTANT}."), self.device) for name in constants
        ]
        self._parameters = inspect.signature(model.forward)
        self._binder = InputBinder(self._parameters, self.program)
        peers = execution.uses_peers and peers_reachable(communicator)
        lowered = run_passes(self.program, execution.passes(self.device, peers=peers))
        self.code = generate(lowered, communicator, self.device)
        if self.code.mailbox is not None:
            self._constants += self.code.mailbox.open(self.device)
        if execution.compile:
            for body in self.code.bodies.values():
                compile_body(body.module, fixed=body.uses_mailbox)
        self._forward = Recording(self._compute) if execution.cuda_graph else self._compute

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks."""
        return self.code.bodies

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """Inputs and weights for one call; raises `MismatchError` if the program was not made for them."""
        return self._binder(args, kwargs), self._weights.fetch()

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call, and whether that may be compared later."""
        return self.digest, False

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result; what forward leaves in caches is left in the arguments."""
        tensors = self.compute(inputs, weights)
        if self.program.signature.effects:
            apply_effects(
                self.program.signature, tensors, bind_arguments(self._parameters, args, kwargs, MismatchError)
            )
        return build_output(self.program.signature, tensors)

    def forget(self) -> None:
        """Free what was recorded."""
        if isinstance(self._forward, Recording):
            self._forward.forget()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Types of what `compute` gives."""
        return tuple(node.meta[SPEC] for node in results_of(self.program.graph))

    def compute(self, inputs: Tensors, weights: Tensors) -> Sequence[torch.Tensor]:
        """The outputs of the program."""
        with plain_modes(self.device.type):
            return self._forward([as_normal_tensor(x) for x in inputs], weights)

    def _compute(self, inputs: Tensors, weights: Tensors) -> Sequence[torch.Tensor]:
        tensors: Sequence[torch.Tensor] = self.code.run.forward(*inputs, *weights, *self._constants)
        if self.code.mailbox is not None:
            self.code.mailbox.join()
        return tensors


def build(
    communicator: Communicator,
    model: nn.Module,
    make: Callable[[], Parallel],
    execution: Execution,
    store: WeightStore | None = None,
    traffic: StepQueue | None = None,
) -> Runner | PipelineRunner:
    """Make a parallel program and its runner; all ranks call it together. A pipeline needs `traffic`.

    Raises:
        MismatchError: on all ranks, if `make` fails on some only, or the programs of the ranks differ.
    """
    failure: Exception | None = None
    work: RankTasks | None = None
    try:
        parallel = make()
        if parallel.pipeline is not None:
            check_pipeline(parallel.pipeline.program, execution)
            verify_schedule(parallel.pipeline)
            work = RankTasks(parallel.pipeline, communicator.rank)
        names: Sequence[str] = (
            state_names(parallel.rank(communicator.rank))[0]
            if work is None
            else work.pipeline.weights_of(communicator.rank)
        )
        if store is None:
            Weights(model, names, parallel.ir.state, communicator.device)
        else:
            store.check(names, parallel.ir.state)
        facts = program_facts(parallel)
    except Exception as error:
        failure, facts = error, {TRACE: failure_text(error)}
    try:
        agree(communicator, digest(facts), lambda: facts)
    except MismatchError as mismatch:
        raise mismatch from failure
    if failure is not None:
        raise failure
    communicator.prepare(_groups(parallel, communicator.rank))
    if work is None:
        return Runner(parallel, model, communicator, facts, execution, store)
    assert traffic is not None
    return PipelineRunner(parallel, model, communicator, facts, execution, work, traffic, store)


def _groups(parallel: Parallel, rank: int) -> Iterator[tuple[str, ...]]:
    """The sets of mesh dims over which some rank talks; for a pipeline, whatever its stage."""
    pipeline = parallel.pipeline
    if pipeline is None:
        programs = [parallel.rank(rank)]
    else:
        everyone = range(pipeline.virtual.world_size)
        programs = [pipeline.part(stage, v).program for stage in range(pipeline.stages) for v in everyone]
    for program in programs:
        yield from (target.mesh_dims for target in communications(program) if len(target.group) > 1)


def program_facts(parallel: Parallel) -> dict[str, str]:
    """What two ranks must have in common to run a program together."""
    signature = parallel.original.signature
    facts = {TRACE: "made"}
    facts |= {leaf.path: "a value" if leaf.spec is None else fact(leaf.spec) for leaf in signature.leaves}
    for guard in signature.guards:
        is_tensor = isinstance(guard.value, torch.Tensor)
        facts[guard.path] = f"contents {contents_hash(guard.value)}" if is_tensor else fact(guard.value)
    facts["the mesh"] = fact(parallel.mesh)
    facts["the program"] = hashlib.blake2b(parallel.text(bodies=True).encode(), digest_size=8).hexdigest()
    return facts

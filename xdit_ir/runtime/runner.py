"""One rank's program, ready to run: code, weights, constants, and the check of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xdit_ir.capture.binder import InputBinder
from xdit_ir.capture.effects import apply_effects
from xdit_ir.capture.inputs import bind_arguments
from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.deferred import materialize
from xdit_ir.deferral.gradients import without_gradients
from xdit_ir.emission.code_writer import EmittedBody
from xdit_ir.emission.codegen import Code
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors, as_normal_tensor, plain_modes
from xdit_ir.emission.recording import Recording
from xdit_ir.errors import MismatchError
from xdit_ir.ir.graphs import placeholders, results_of
from xdit_ir.ir.program import SPEC, Program, TensorSpec
from xdit_ir.sharding.report import CacheUse
from xdit_ir.transport.distributed import peers_reachable
from xdit_ir.transport.handshake import Facts, agree_contents, digest
from xdit_ir.transport.pulls import room_for_peers


class Runnable:
    """A rank's program as code, recorded where that is wanted. Making one is collective."""

    def __init__(self, context: RankContext, program: Program, *, peers: bool) -> None:
        execution = context.execution
        packed = execution.packs and context.communicator.mesh.world_size > 1
        self.code = context.code(program, peers=peers, packed=packed, shared=True)
        self._places: Sequence[int] | None = None  # of its weights, where those that it is given are more than these
        self.constants = self.code.constant_tensors(context.device)
        if self.code.mailbox is not None:
            self.constants += self.code.mailbox.open(context.workspaces)
        forced, tried = execution.forced, context.shared_codes.tried
        self.recording = (
            Recording(self.code, context.graph_pool, forced=forced, tried=tried, at_once=forced)
            if execution.cuda_graph
            else None
        )

    def among(self, names: Sequence[str]) -> None:
        """It will be given the weights of these names, of which it takes its own."""
        places = {name: place for place, name in enumerate(names)}
        own = [places[name] for name in self.code.weights]
        self._places = None if own == list(places.values()) else own

    def __call__(self, inputs: Tensors, weights: Tensors) -> Sequence[torch.Tensor]:
        """The results."""
        own = weights if self._places is None else [weights[place] for place in self._places]
        state = [*own, *self.constants]
        self.code.enter()
        return self.code([*inputs, *state]) if self.recording is None else self.recording(inputs, state)

    def notes(self) -> list[str]:
        """What is recorded, and what does not run as it should."""
        return [*([] if self.recording is None else [str(self.recording)]), *self.code.failures]


class Runner:
    """Runs one rank's program in this process; making one is collective, see `RankRunner`.

    `parts`: the programs that it runs in turn, if it is not run whole.
    """

    def __init__(self, context: RankContext, program: Program, facts: Facts, parts: Sequence[Program] = ()) -> None:
        self.program, self.device, self.facts, self._digest = program, context.device, facts, digest(facts)
        self._model, self._parameters = context.model, context.parameters
        self._binder = InputBinder(self._parameters, program)
        peers = context.execution.uses_peers and peers_reachable(context.communicator)
        self._runnables = [Runnable(context, part, peers=peers) for part in parts or (program,)]
        self._names = list(dict.fromkeys(name for one in self._runnables for name in one.code.weights))
        for one in self._runnables:
            one.among(self._names)
        self._agree_originals(context)
        room = room_for_peers(self.device) if peers else None
        self._weights = context.store.take(self._names, program.state, program.stored, room)
        self.places = self._weights.places
        self._whole = [place for place, name in enumerate(self._names) if name not in program.stored]
        self._inputs = [node.name for node in placeholders(program.graph)]
        self._compiled = context.execution.compile

    @property
    def code(self) -> Code:
        """That of all it runs, or of the first part."""
        return self._runnables[0].code

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks."""
        return {name: body for one in self._runnables for name, body in one.code.bodies.items()}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        """Inputs and weights for one call; raises `MismatchError` if the program was not made for them."""
        return self._binder(args, kwargs), self._weights.fetch()

    def held(self, weights: Tensors) -> tuple[Sequence[str], Tensors]:
        """Names and tensors of all weights that are here: those that are used, but for those of which each rank has
        another part."""
        return [self._names[place] for place in self._whole], [weights[place] for place in self._whole]

    def _agree_originals(self, context: RankContext) -> None:
        """Make sure that all ranks take their parts of the same weights, while they have all of each."""
        if context.communicator.line is not None and self.program.stored:
            found = context.store.originals(self._names, self.program.state, self.program.stored)
            agree_contents(context.communicator, found)

    def plain(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """All inputs, by name."""
        return {name: materialize(x) for name, x in zip(self._inputs, inputs, strict=True)}

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call, and whether that may be compared later."""
        return self._digest, False

    def told(self, inputs: Tensors) -> Facts:
        """What that is, besides arguments and program: nothing."""
        return {}

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result; what forward leaves in caches is left in the arguments."""
        tensors = without_gradients(self.compute(inputs, weights), weights)
        if self.program.signature.effects:
            named = bind_arguments(self._parameters, args, kwargs, MismatchError)
            apply_effects(self.program.signature, tensors, named, self._model)
        return build_output(self.program.signature, tensors)

    def forget(self) -> None:
        """Free what was recorded."""
        for one in self._runnables:
            if one.recording is not None:
                one.recording.forget()

    @property
    def execution(self) -> str:
        """How it runs, and what does not run as it should."""
        notes = dict.fromkeys(note for one in self._runnables for note in one.notes())
        return "; ".join(["compiled" if self._compiled else "eagerly", *notes])

    @property
    def cache(self) -> CacheUse | None:
        """How often a step cache was of use: there is none."""
        return None

    @property
    def constants(self) -> Tensors:
        """What it reads besides inputs and weights: tables, and tensors in attributes of the model themselves."""
        return [x for one in self._runnables for x in one.constants]

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Types of what `compute` gives."""
        return tuple(node.meta[SPEC] for node in results_of(self.program.graph))

    def compute(self, inputs: Tensors, weights: Tensors) -> Sequence[torch.Tensor]:
        """The outputs of the program."""
        with plain_modes(self.device.type):
            return self._runnables[0](self._plain(inputs), weights)

    def _plain(self, inputs: Tensors) -> Tensors:
        return [as_normal_tensor(materialize(x)) for x in inputs]

"""One pass of the patches through the stages of a pipeline: what goes in, what is on its way, what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from xdit_ir.deferral.deferred import Deferred, materialize, materialize_slice, pending
from xdit_ir.deferral.descent import Numbered
from xdit_ir.emission.execution import as_normal_tensor
from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipefusion.patch_cut import PatchCut
from xdit_ir.pipefusion.rank_tasks import Held, Need, RankTasks
from xdit_ir.pipelined.channels import Channels
from xdit_ir.pipelined.memory import zeros
from xdit_ir.pipelined.requests import GuidanceBranch
from xdit_ir.pipelined.schedule import StageRun, items_of
from xdit_ir.pipelined.stage_code import RankCode
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.transport.messages import Arrival

Tensors = list[torch.Tensor]


@dataclass(eq=False)
class PipelinePass:
    """A call of the model: its `inputs` and `weights` by name, the messages that are expected, the results (by patch;
    None: of all patches), and what this rank's first stages hold for its later ones. `half`: which half of `cfg` runs
    it, where they run calls apart."""

    number: int
    half: int
    synchronous: bool
    branch: GuidanceBranch
    inputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    code: RankCode
    channels: Channels
    queue: StepQueue
    arrivals: dict[StageRun, Arrival] = field(default_factory=dict)
    returns: dict[int | None, Arrival | None] = field(default_factory=dict)
    results: dict[int | None, Tensors] = field(default_factory=dict)
    held: dict[Held, torch.Tensor] = field(default_factory=dict)

    @property
    def tasks(self) -> RankTasks:
        """What this rank runs."""
        return self.channels.tasks

    def issue(self) -> None:
        """Expect all messages, and put off the runs of this rank's stages, if its half runs any."""
        pipeline, mine = self.tasks.pipeline, self.half == self.channels.half
        runs = items_of(pipeline, self.number, self.tasks.stages if mine else (), synchronous=self.synchronous)
        self.channels.free(self.number)
        self.arrivals = self.channels.arrivals((item, self.code.task(item)) for item in runs)
        self.returns = self.channels.results(self.number, self.half, synchronous=self.synchronous)
        self.queue.put_off(self, runs)

    def execute(self, item: StageRun) -> None:
        """Run a stage for a patch, or for all of them, and send what it gives."""
        task, device = self.code.task(item), self.queue.communicator.device
        arrival = self.arrivals.pop(item, None)
        received = arrival.take() if arrival is not None else [zeros(spec, device) for spec in task.receives]
        given = [self._input(need) for need in task.needs]
        given += [received[one] if isinstance(one, int) else self.held.pop(one) for one in task.feed]
        assert self.branch.memory is not None
        self._deliver(item, self.code.run(item, self.branch.memory, given, self.weights))

    def result(self, patch: int | None) -> Tensors:
        """The results of a patch; waits for them."""
        if patch not in self.results and (lost := self.queue.communicator.lost()) is not None:
            raise lost
        with self.queue.communicator.working():
            return self._result(patch)

    def _result(self, patch: int | None) -> Tensors:
        if patch in self.returns:
            self.queue.settle()
            arrival = self.returns.pop(patch)
            self.results[patch] = [] if arrival is None else arrival.take()
        if patch not in self.results:
            self.queue.run(until=lambda: patch in self.results)
        return self.results[patch]

    def _input(self, need: Need) -> torch.Tensor:
        """What a stage wants of an input; waits for no more of the results that it was made of."""
        x = self.inputs[need.name]
        if need.patches is None:
            return as_normal_tensor(materialize(x))
        cut = self.tasks.latents[need.name]
        if not isinstance(x, Deferred):
            return _joined([x.narrow(cut.dim, *run) for run in cut.joined(need.patches).runs], x, cut.dim)
        runs = sorted(run for patch in need.patches for run in cut.parts[patch].runs)
        return as_normal_tensor(
            _joined([materialize_slice(x, cut.dim, start, start + size) for start, size in runs], x, cut.dim)
        )

    def _deliver(self, item: StageRun, outputs: Sequence[torch.Tensor]) -> None:
        """Hand on what a stage gave: to the next one, to a later one of this rank, or as results to all ranks."""
        task = self.code.task(item)
        self.held |= dict(zip(task.carried_out, outputs[len(task.sends) :], strict=False))
        if item.stage == self.tasks.pipeline.stages - 1:
            self.results[item.patch] = list(outputs)
        self.channels.send(item, task, outputs)


def _joined(pieces: Sequence[torch.Tensor], x: torch.Tensor, dim: int) -> torch.Tensor:
    if not pieces:
        return torch.empty([0 if d == dim else size for d, size in enumerate(x.shape)], dtype=x.dtype, device=x.device)
    return torch.cat(list(pieces), dim) if len(pieces) > 1 else pieces[0]


@dataclass(frozen=True, eq=False)
class Result:
    """An output of the model as a source of parts; `places[p]`: where it is among the results of patch p (None: with
    the last patch only). Of a synchronous pass, `firsts[p]` is where the results of patch p begin among all."""

    made: PipelinePass
    cut: PatchCut | None
    places: tuple[int | None, ...]
    firsts: tuple[int, ...] | None

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """A range of one dimension; waits for the patches that have some of it."""
        if self.cut is None or dim != self.cut.dim:
            return self.whole().narrow(dim, start, stop - start)
        found = []
        for patch, part in enumerate(self.cut.parts):
            offset = 0
            for first, size in part.runs:
                low, high = max(start, first), min(stop, first + size)
                if low < high:
                    found.append((low, self._of(patch).narrow(dim, offset + low - first, high - low)))
                offset += size
        found.sort(key=lambda piece: piece[0])
        return torch.cat([piece for _, piece in found], dim) if len(found) > 1 else found[0][1]

    def whole(self) -> torch.Tensor:
        """All of it; waits for all patches."""
        if self.cut is None:
            return self._of(len(self.places) - 1)
        return self.part(self.cut.dim, 0, self.cut.size)

    def _of(self, patch: int) -> torch.Tensor:
        place = self.places[patch]
        assert place is not None
        if self.firsts is not None:
            return self.made.result(None)[self.firsts[patch] + place]
        return self.made.result(patch)[place]


def outputs_of(made: PipelinePass, specs: Sequence[TensorSpec]) -> list[Deferred]:
    """The outputs that the model makes, of types `specs`, from the results of the patches."""
    tasks, requests = made.tasks, made.queue.requests
    firsts = tasks.firsts if made.synchronous else None
    found = []
    for output, (cut, spec) in enumerate(zip(tasks.cuts, specs, strict=True)):
        if tasks.returned[output] is not None:
            continue
        source = Result(made, cut, tasks.places(output), firsts)
        device, by = made.queue.communicator.device, (requests, Numbered(made.number, output))
        found.append(pending(source, spec.shape, spec.dtype, device, by))
    return found

"""One pass of the patches through the stages of a pipeline: what goes in, what is on its way, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from xdit_ir.deferral.deferred import Deferred, materialize, materialize_slice, pending
from xdit_ir.emission.execution import as_normal_tensor
from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipefusion.patch_cut import PatchCut
from xdit_ir.pipefusion.rank_tasks import Held, Need
from xdit_ir.pipelined.requests import GuidanceBranch
from xdit_ir.pipelined.schedule import StageRun
from xdit_ir.pipelined.step_queue import StepQueue
from xdit_ir.transport.messages import Arrival, Envelope

Tensors = list[torch.Tensor]


@dataclass(eq=False)
class PipelinePass:
    """The inputs by name, the messages that are expected, the results (by patch; None: of all patches), and what this
    rank's first stages hold for its later ones. `half`: which half of `cfg` runs it, where they run calls apart."""

    number: int
    half: int
    lane: GuidanceBranch
    inputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    run: Callable[[PipelinePass, StageRun], None]
    traffic: StepQueue
    arrivals: dict[tuple[int, int | None], Arrival] = field(default_factory=dict)
    returns: dict[int | None, Arrival] = field(default_factory=dict)
    results: dict[int | None, Tensors] = field(default_factory=dict)
    held: dict[Held, torch.Tensor] = field(default_factory=dict)

    def execute(self, item: StageRun) -> None:
        """Run a stage."""
        self.run(self, item)

    def result(self, patch: int | None) -> Tensors:
        """The results of a patch; waits for them."""
        if patch in self.returns:
            self.traffic.settle()
            self.results[patch] = self.returns.pop(patch).take()
        if patch not in self.results:
            self.traffic.run(until=lambda: patch in self.results)
        return self.results[patch]

    def given(self, need: Need, cuts: Mapping[str, PatchCut]) -> torch.Tensor:
        """What a stage wants of an input; waits for no more of the results that it was made of."""
        x = self.inputs[need.name]
        if need.patches is None:
            return as_normal_tensor(materialize(x))
        cut = cuts[need.name]
        if not isinstance(x, Deferred):
            return _joined([x.narrow(cut.dim, *run) for run in cut.joined(need.patches).runs], x, cut.dim)
        runs = sorted(run for patch in need.patches for run in cut.parts[patch].runs)
        return as_normal_tensor(
            _joined([materialize_slice(x, cut.dim, start, start + size) for start, size in runs], x, cut.dim)
        )


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


def outputs_of(
    made: PipelinePass,
    types: Sequence[Sequence[TensorSpec]],
    cuts: Sequence[PatchCut | None],
    specs: Sequence[TensorSpec],
    device: torch.device,
    maker: object,
    *,
    synchronous: bool,
) -> list[Deferred]:
    """The model's outputs, of types `specs`, from the results of the patches, of `types`."""
    last = len(types) - 1
    firsts = tuple(sum(len(t) for t in types[:patch]) for patch in range(len(types))) if synchronous else None
    found = []
    for index, (cut, spec) in enumerate(zip(cuts, specs, strict=True)):
        before = sum(one is not None for one in cuts[:index])
        places = tuple(index if p == last else before if cut is not None else None for p in range(len(types)))
        source = Result(made, cut, places, firsts)
        found.append(pending(source, spec.shape, spec.dtype, device, maker, made.number))
    return found


def envelope(specs: Sequence[TensorSpec]) -> Envelope | None:
    """The message for tensors of these types; None if there is nothing in it."""
    made = Envelope.of(specs)
    return made if made.size else None

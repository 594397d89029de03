"""To which request, step and branch a call of a pipeline belongs: what its latents were made of says it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xdit_ir.deferral.deferred import Deferred, descents_of
from xdit_ir.deferral.descent import Descent, Numbered, are_held
from xdit_ir.pipefusion.patch_cut import PatchCut
from xdit_ir.pipelined.memory import StageBuffers

NEW, NEXT, AGAIN = "a new request", "the next step", "the same step again"


@dataclass(eq=False)
class GuidanceBranch:
    """One of the calls that a pipeline makes in every step, such as that without the prompt; `steps` in a row so far.

    Its memory belongs to it alone.
    """

    owner: Any
    steps: int = 0
    last: int = -1
    memory: StageBuffers | None = None


@dataclass(frozen=True)
class CallPosition:
    """What a call is: `kind`, and which call of its step, counting from 0."""

    kind: str
    place: int
    synchronous: bool


class Requests:
    """The request that a module is working on.

    A call whose latents follow, position by position, from the module's latest output is the next step. One with the
    same latents as the call before, whose output is not thrown away, is a further call of that step. Every other call
    begins a new request.
    """

    def __init__(self) -> None:
        self.number = 0
        self.forget()

    def forget(self) -> None:
        """Drop the request and its buffers."""
        self._step, self._place = 0, 0
        self._branches: list[GuidanceBranch] = []
        self._given: list[tuple[torch.Tensor, int]] | None = None
        self._began: int | None = None
        self._latest: int | None = None
        self._several = False
        self._outputs: list[weakref.ref[Numbered]] = []

    def position(
        self, latents: Mapping[str, torch.Tensor], cuts: Mapping[str, PatchCut], owner: Any, warmup: int
    ) -> CallPosition:
        """What a call with these latents is, for a program that begins with `warmup` synchronous steps."""
        kind = self._kind(latents, cuts)
        place = self._place + 1 if kind == AGAIN else 0
        step = self._step + (kind == NEXT)
        branch = self._branches[place] if kind != NEW and place < len(self._branches) else None
        goes_on = branch is not None and branch.owner is owner and branch.last == step - 1
        return CallPosition(kind, place, not goes_on or branch is None or branch.steps < warmup)

    def enter(self, position: CallPosition, latents: Mapping[str, torch.Tensor], owner: Any) -> GuidanceBranch:
        """Begin the call; its branch."""
        if position.kind == NEW:
            self.forget()
            self._given = [(x, version_of(x)) for x in latents.values()]
        if position.kind == NEXT:
            self._step += 1
            self._given, self._began = None, self._latest
        if position.kind != AGAIN:
            self._outputs = []
        self._place = position.place
        if position.place == len(self._branches):
            self._branches.append(GuidanceBranch(owner))
        branch = self._branches[position.place]
        if branch.owner is not owner:
            branch = self._branches[position.place] = GuidanceBranch(owner)
        branch.steps = branch.steps + 1 if branch.last == self._step - 1 else 1
        branch.last = self._step
        return branch

    def returned(self, number: int, outputs: Sequence[Deferred]) -> None:
        """The call that was entered gave these."""
        self._latest, self._several = number, len(outputs) > 1
        self._outputs += [weakref.ref(output.value.lineage[self].result) for output in outputs[:1]]

    def _kind(self, latents: Mapping[str, torch.Tensor], cuts: Mapping[str, PatchCut]) -> str:
        if self._latest is None:
            return NEW
        descents = descents_of(self, latents)
        followed = all(_follows(one, cuts[name]) for name, one in descents.items())
        if descents and followed and self._in_order(descents, latents):
            newest = max(one.number for one in descents.values())
            if newest == self._latest:
                return NEXT
            if newest == self._began and are_held(self._outputs):
                return AGAIN
            return NEW
        plain = not any(isinstance(x, Deferred) for x in latents.values())
        if plain and self._given is not None and are_held(self._outputs) and self._same(latents):
            return AGAIN
        return NEW

    def _in_order(self, descents: Mapping[str, Descent], latents: Mapping[str, torch.Tensor]) -> bool:
        """Whether latents that could change places (samples in a list) were made of several outputs in their order."""
        last: dict[torch.Size, int] = {}
        for name, one in descents.items():
            shape = latents[name].shape
            if self._several and last.get(shape, -1) >= one.result.output:
                return False
            last[shape] = one.result.output
        return True

    def _same(self, latents: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the latents with which the request began; waits for the device only if they may be."""
        assert self._given is not None
        return len(self._given) == len(latents) and all(
            version_of(before) == version
            and before.shape == x.shape
            and before.dtype == x.dtype
            and (before is x or torch.equal(before, x))
            for (before, version), x in zip(self._given, latents.values(), strict=True)
        )


def _follows(descent: Descent, cut: PatchCut) -> bool:
    """Position by position of what is cut, and sample by sample."""
    if cut.dim >= len(descent.dims) or descent.dims[cut.dim] != (cut.dim, cut.shift):
        return False
    return cut.dim == 0 or (descent.samples is not None and descent.samples.in_place)


def version_of(x: torch.Tensor) -> int:
    """Counts writes to a tensor, where PyTorch does."""
    return -1 if x.is_inference() else x._version

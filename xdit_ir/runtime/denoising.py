"""To which step of which request, and to which branch of its guidance, a call belongs: for what steps leave each other.

A call whose inputs are made of this module's latest output begins the next step; further calls of a step are made of
the outputs of the one before, or, in the first step, of the same latents. Every other call begins a new request. Of
the branches of the last step, a call goes on with the one whose other inputs it has.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from xdit_ir.caching.decision import BranchMemory
from xdit_ir.deferral.deferred import Deferred, descents_of
from xdit_ir.deferral.descent import Descent, Numbered, are_held
from xdit_ir.deferral.recorded import RecordedValue
from xdit_ir.pipelined.requests import AGAIN, NEW, NEXT, version_of

MOST = 8  # branches of guidance; more calls with the same latents are requests of their own


@dataclass(frozen=True)
class _Input:
    """A tensor as it was in an earlier call."""

    tensor: torch.Tensor
    version: int

    def same(self, x: torch.Tensor) -> bool:
        """Whether another one holds the same."""
        if version_of(self.tensor) != self.version:
            return False
        if x is self.tensor or isinstance(x, Deferred) or isinstance(self.tensor, Deferred):
            return x is self.tensor
        return x.shape == self.tensor.shape and x.dtype == self.tensor.dtype and torch.equal(x, self.tensor)


@dataclass(eq=False)
class Branch:
    """One of the calls of every step. `varying`: the inputs, besides latents, that differ from step to step, where
    that is known."""

    owner: object
    memory: BranchMemory
    given: dict[str, _Input]
    varying: set[str] | None = None


@dataclass(eq=False)
class Denoising:
    """The request that a module works on. It is what makes its outputs, as their lineage says.

    `calls` were run by this rank since it was made, and `skipped` of them reused something; `contexts` has how many
    there were in each context, where others know that.
    """

    number: int = 0
    calls: int = 0
    skipped: int = 0
    contexts: weakref.WeakKeyDictionary[object, int] = field(default_factory=weakref.WeakKeyDictionary)
    _kind: str = NEW
    _step: int = 0
    _latest: int | None = None
    _began: int | None = None
    _before: list[Branch] = field(default_factory=list)
    _now: list[Branch] = field(default_factory=list)
    _outputs: list[weakref.ref[Numbered]] = field(default_factory=list)

    def forget(self) -> None:
        """The request has failed, or what its steps have left is given up."""
        self._step, self._latest, self._began = 0, None, None
        self._before, self._now, self._outputs = [], [], []

    def kind(self, inputs: Mapping[str, torch.Tensor]) -> str:
        """What a call with these inputs is."""
        if self._latest is None:
            return NEW
        found = descents_of(self, inputs).values()
        if found:
            newest = max(one.number for one in found)
            if newest == self._latest:
                return NEXT
            return AGAIN if newest == self._began and are_held(self._outputs) else NEW
        return AGAIN if self._step == 0 and are_held(self._outputs) and len(self._now) < MOST else NEW

    def place(self, inputs: Mapping[str, torch.Tensor]) -> str:
        """Where a call with these inputs stands, for ranks that compare it."""
        kind = self.kind(inputs)
        return f"{kind}, call {len(self._now) if kind == AGAIN else 0} of its step"

    def enter(self, inputs: Mapping[str, torch.Tensor], owner: object) -> BranchMemory:
        """Begin a call; what its branch remembers."""
        kind, descents = self.kind(inputs), descents_of(self, inputs)
        if kind == NEW:
            self.forget()
        elif kind == NEXT:
            self._before = self._of_one_request(descents) if self._step == 0 else self._now
            self._step, self._began, self._now, self._outputs = self._step + 1, self._latest, [], []
        others = {name: x for name, x in inputs.items() if name not in descents}
        branch = self._branch(others, owner)
        branch.given = {name: _Input(x, version_of(x)) for name, x in others.items()}
        self._now.append(branch)
        self.number += 1
        branch.memory.calls += 1
        return branch.memory

    def returned(self, results: Sequence[torch.Tensor]) -> list[Deferred]:
        """The results of the call that was entered, as such whose lineage is known."""
        self._latest, number = self.number, Numbered(self.number)
        self._outputs.append(weakref.ref(number))
        return [self._noted(x, number) for x in results]

    def _noted(self, x: torch.Tensor, number: Numbered) -> Deferred:
        made = x if isinstance(x, Deferred) else Deferred(RecordedValue(x.shape, x.stride(), x.dtype, x.device, done=x))
        made.value.lineage = {self: Descent.of(number, x.dim())}
        return made

    def _of_one_request(self, latents: Mapping[str, Descent]) -> list[Branch]:
        """The calls of the first step that had the latents of the last one."""
        found = list[Branch]()
        for branch in reversed(self._now):
            last = self._now[-1].given
            if not all(name in last and name in branch.given for name in latents):
                break
            if not all(last[name].same(branch.given[name].tensor) for name in latents):
                break
            found.insert(0, branch)
        return found

    def _branch(self, others: Mapping[str, torch.Tensor], owner: object) -> Branch:
        """The branch of the step before that a call goes on with, or a new one."""
        free = [one for one in self._before if one not in self._now and one.owner is owner]
        changed = [{name for name, x in others.items() if not _has(one, name, x)} for one in free]
        fresh = Branch(owner, BranchMemory(), {})
        if not free:
            return fresh
        branch, differing = min(zip(free, changed, strict=True), key=lambda one: len(one[1]))
        streams = {name for name in differing if others[name].dim() > 2}
        if differing <= branch.varying if branch.varying is not None else not streams:
            branch.varying = differing | (branch.varying or set())
            return branch
        fresh.varying = differing
        return fresh


def _has(branch: Branch, name: str, x: torch.Tensor) -> bool:
    return name in branch.given and branch.given[name].same(x)

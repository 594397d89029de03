"""Whether a step computes its region or reuses the last change: decided alike wherever the same call is run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from xdit_ir.caching.kept import PastValue
from xdit_ir.caching.rule import CacheRule, Watched
from xdit_ir.sharding.report import CacheUse

REGION = frozenset({0})  # the group of what leaves a region
Change = tuple[float, float, float]
"""Whether there is nothing to compare with (1, else 0); by how much a rank's part has changed, and how much it was."""


@dataclass(eq=False)
class BranchMemory:
    """What the steps of one branch of guidance leave for each other on a rank, which has run `step` of `calls`."""

    calls: int = 0
    step: int = 0
    summed: float = 0.0
    watched: Sequence[torch.Tensor] | None = None
    kept: Sequence[PastValue] | None = None

    def catch_up(self, step: int) -> None:
        """Before a step: what is kept is of no use where others have run the one before: ranks, or another program."""
        if self.step != step:
            self.step, self.kept = step, None

    def change(self, watched: Sequence[torch.Tensor]) -> torch.Tensor:
        """That of a rank's part of what is watched, as a `Change`, on its device."""
        before = self.watched
        if before is None or self.kept is None:
            return torch.tensor([1, 0, 0], dtype=torch.float64, device=watched[0].device)
        moved = [_size(x.float() - last.float()) for x, last in zip(watched, before, strict=True)]
        was = [_size(last.float()) for last in before]
        return torch.stack([torch.zeros_like(moved[0]), torch.stack(moved).sum(), torch.stack(was).sum()])

    def reused(self, rule: CacheRule, watched: Sequence[torch.Tensor], changes: Iterable[Change]) -> frozenset[int]:
        """Begin the next step: the groups that it reuses, by the changes of all ranks that run the call."""
        found = self._reused(rule, list(changes))
        self.step += 1
        if rule.watched is Watched.TIMESTEP or not found:
            self.watched = list(watched)
        if not found:
            self.summed = 0.0
        return found

    def recall(self, points: Sequence[int], reused: frozenset[int]) -> list[torch.Tensor]:
        """What the step that has begun takes for the values of these groups; `points` has the group of each value."""
        kept = zip(self.kept or (), points, strict=bool(reused))
        return [one.reuse(self.step - 1) for one, group in kept if group in reused]

    def remember(
        self, rule: CacheRule, points: Sequence[int], reused: frozenset[int], computed: Iterable[torch.Tensor]
    ) -> None:
        """Keep the values that the step has computed, those of all other groups."""
        self.kept = self.kept or [rule.history(group) for group in points]
        made = (one for one, group in zip(self.kept, points, strict=True) if group not in reused)
        for one, x in zip(made, computed, strict=True):
            one.keep(x, self.step - 1)

    def _reused(self, rule: CacheRule, changes: Sequence[Change]) -> frozenset[int]:
        if self.kept is None:
            return frozenset()
        if rule.watched is Watched.NOTHING:
            return rule.reused(self.step)
        new, moved, before = map(sum, zip(*changes, strict=True))
        if new:
            return frozenset()
        if rule.watched is Watched.FIRST_BLOCK:
            return frozenset() if moved > rule.threshold * before else REGION
        self.summed += moved / before if before > 0 else math.inf
        return REGION if self.summed < rule.threshold else frozenset()


@dataclass(eq=False)
class CacheCount:
    """How many calls there were, and how many of them reused their region."""

    rule: CacheRule
    calls: int = 0
    skipped: int = 0

    def add(self, *, skipped: bool) -> None:
        """Count a call."""
        self.calls += 1
        self.skipped += skipped

    @property
    def use(self) -> CacheUse:
        """For a report."""
        return CacheUse(self.rule.text, self.calls, self.skipped)


def _size(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sum(dtype=torch.float64)

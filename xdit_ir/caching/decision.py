"""Whether a step computes its region or reuses the last change: decided alike wherever the same call is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from xdit_ir.caching.rule import CacheRule, Watched
from xdit_ir.sharding.report import CacheUse

Change = tuple[float, float, float]
"""Whether there is nothing to compare with (1, else 0); by how much a rank's part has changed, and how much it was."""


@dataclass(eq=False)
class BranchMemory:
    """What the steps of one branch of guidance leave for each other on a rank, which has run `step` of `calls`."""

    calls: int = 0
    step: int = 0
    summed: float = 0.0
    watched: Sequence[torch.Tensor] | None = None
    kept: Sequence[torch.Tensor] | None = None

    def catch_up(self, step: int) -> None:
        """Before a step: what is kept is of no use where other ranks have run the one before."""
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

    def skips(self, rule: CacheRule, watched: Sequence[torch.Tensor], changes: Iterable[Change]) -> bool:
        """Begin the next step: whether it reuses what is kept, by the changes of all ranks that run the call."""
        reuses = self._reuses(rule, list(changes))
        self.step += 1
        if rule.watched is Watched.TIMESTEP or not reuses:
            self.watched = list(watched)
        if not reuses:
            self.summed = 0.0
        return reuses

    def _reuses(self, rule: CacheRule, changes: Sequence[Change]) -> bool:
        if self.kept is None:
            return False
        if rule.watched is Watched.NOTHING:
            return not rule.computes(self.step)
        new, moved, before = map(sum, zip(*changes, strict=True))
        if new or not before > 0:
            return False
        if rule.watched is Watched.FIRST_BLOCK:
            return 0 < moved / before <= rule.threshold  # what never changes says nothing of the latents
        self.summed += moved / before
        return self.summed < rule.threshold


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

"""Every rank of a program with a step cache in this thread, step after step of one request."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xdit_ir.caching.cut import CachedProgram
from xdit_ir.caching.decision import BranchMemory, CacheCount
from xdit_ir.ir.interpret import State
from xdit_ir.ir.program import Program
from xdit_ir.simulation.lockstep import RankObserver, run_each

Tensors = tuple[torch.Tensor, ...]


class CachedSimulation:
    """Consecutive steps of one request by one branch; every rank keeps what is its own."""

    def __init__(self, ranks: Sequence[CachedProgram], state: State, device: torch.device, count: CacheCount) -> None:
        self.ranks, self.state, self.device, self.count = ranks, state, device, count
        self.memories = [BranchMemory() for _ in ranks]

    def step(self, inputs: Sequence[torch.Tensor], observe: RankObserver | None = None) -> list[Tensors]:
        """The outputs of every rank for the inputs of the next step; `observe` sees every value."""
        watched, given = self._decisive(inputs, observe)
        together = list(zip(self.memories, watched, strict=True))
        changes = [(*map(float, memory.change(mine).tolist()),) for memory, mine in together if mine]
        rule, points = self.count.rule, self.ranks[0].points
        [reused] = {memory.reused(rule, mine, changes) for memory, mine in together}  # type: ignore[arg-type]
        self.count.add(skipped=bool(reused))
        kept = [memory.recall(points, reused) for memory in self.memories]
        full = [[*mine, *before] for mine, before in zip(given, kept, strict=True)]
        found = self._run([one.rest[reused] for one in self.ranks], full, observe)
        count = self.ranks[0].outputs
        for memory, values in zip(self.memories, found, strict=True):
            memory.remember(rule, points, reused, values[count:])
        return [values[:count] for values in found]

    def _decisive(
        self, inputs: Sequence[torch.Tensor], observe: RankObserver | None
    ) -> tuple[list[Tensors], list[list[torch.Tensor]]]:
        """By rank what is watched, and what the rest of the step takes."""
        heads = [one.head for one in self.ranks if one.head is not None]
        if not heads:
            return [() for _ in self.ranks], [list(inputs) for _ in self.ranks]
        found, count = self._run(heads, [inputs for _ in heads], observe), self.ranks[0].watched
        return [values[:count] for values in found], [[*inputs, *values[count:]] for values in found]

    def _run(
        self, programs: Sequence[Program], given: Sequence[Sequence[torch.Tensor]], observe: RankObserver | None
    ) -> list[Tensors]:
        return run_each(programs, self.state, given, self.device, observe)

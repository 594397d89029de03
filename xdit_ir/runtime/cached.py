"""Runs a rank's program with a step cache: what decides, then the rest with its region of blocks, or without."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from xdit_ir.caching.cut import CachedProgram
from xdit_ir.caching.decision import BranchMemory, Change
from xdit_ir.caching.rule import CacheRule
from xdit_ir.capture.outputs import build_output
from xdit_ir.deferral.gradients import without_gradients
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors, plain_modes
from xdit_ir.ir.program import Program
from xdit_ir.runtime.denoising import Denoising
from xdit_ir.runtime.pairing import Pairing, copied
from xdit_ir.runtime.runner import Runner
from xdit_ir.sharding.report import CacheUse
from xdit_ir.transport.handshake import Facts, digest


class CachedRunner(Runner):
    """Its results are `Deferred`, though they are there: what is made of them tells to which request a call belongs.

    `pairing`: parts of `cfg` run different calls, each with what it has kept itself. A call that all parts run computes
    all blocks, as they may have kept different things. `branch`: who else knows to which branch of which request a call
    belongs, by a name and an object that lives as long as that.
    """

    def __init__(
        self,
        context: RankContext,
        program: Program,
        cached: CachedProgram,
        rule: CacheRule,
        facts: Facts,
        denoising: Denoising,
        pairing: Pairing | None,
        branch: Callable[[], tuple[str, object]] | None = None,
    ) -> None:
        super().__init__(context, program, facts, cached.programs)
        self._rule, self._denoising, self._pairing, self._branch = rule, denoising, pairing, branch
        self._memories = weakref.WeakKeyDictionary[object, BranchMemory]()
        self._head = None if cached.head is None else self._runnables[0]
        self._rest = dict(zip(cached.rest, self._runnables[-len(cached.rest) :], strict=True))
        self._watched, self._given, self._points = cached.watched, cached.outputs, cached.points
        self._communicator = context.communicator
        self._dims = context.communicator.mesh.dims_of_a_call(paired=pairing is not None)
        context.communicator.prepare([self._dims])

    @property
    def cache(self) -> CacheUse:
        """How often the cache was of use, for all programs of the module."""
        return CacheUse(self._rule.text, self._denoising.calls, self._denoising.skipped)

    def vote(self, inputs: Tensors) -> tuple[int, bool]:
        """What all ranks must agree on before a call: the program, and where the call stands."""
        return digest({"the program": str(self._digest), **self.told(inputs)}), False

    def told(self, inputs: Tensors) -> Facts:
        """What that is, besides arguments and program, for ranks that do not agree."""
        if self._branch is None:
            return {"the place of the call": self._denoising.place(self._by_name(inputs))}
        name, state = self._branch()
        calls = self._denoising.contexts.get(state, 0)
        reused = f", which reuses {sorted(self._rule.reused(calls))}" if self._rule.groups else ""
        return {"the place of the call": f"call {calls} in the context {name!r}{reused}"}

    def run(self, inputs: Tensors, weights: Tensors, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's result."""
        try:
            results = self._results(inputs, weights, self._enter(inputs))
        except BaseException:
            self._give_up()
            raise
        noted = self._denoising.returned(results) if self._branch is None else results
        return build_output(self.program.signature, without_gradients(noted, weights))

    def _enter(self, inputs: Tensors) -> BranchMemory:
        """Begin a call; what its branch remembers."""
        if self._branch is None:
            return self._denoising.enter(self._by_name(inputs), self)
        state = self._branch()[1]
        memory, counts = self._memories.setdefault(state, BranchMemory()), self._denoising.contexts
        memory.calls = counts[state] = counts.get(state, 0) + 1
        return memory

    def _give_up(self) -> None:
        """What steps have left."""
        self._denoising.forget()
        self._memories.clear()

    def forget(self) -> None:
        """Free what was recorded, and what steps have left."""
        super().forget()
        self._give_up()

    def _by_name(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        return dict(zip(self._inputs, inputs, strict=True))

    def _results(self, inputs: Tensors, weights: Tensors, memory: BranchMemory) -> Sequence[torch.Tensor]:
        if self._pairing is None:
            memory.catch_up(memory.calls - 1)
            return self._step(inputs, weights, memory)
        given, step = copied(inputs), memory.calls - 1

        def work(everywhere: bool) -> Sequence[torch.Tensor]:
            memory.catch_up(step)
            if everywhere:
                memory.kept = None
            return self._step(given, weights, memory)

        return self._pairing.call(work, self.outputs, [*weights, *self.constants])

    def _step(self, inputs: Tensors, weights: Tensors, memory: BranchMemory) -> Sequence[torch.Tensor]:
        with plain_modes(self.device.type):
            given, watched = self._plain(inputs), list[torch.Tensor]()
            if self._head is not None:
                found = list(self._head(given, weights))
                watched, given = found[: self._watched], [*given, *found[self._watched :]]
            reused = memory.reused(self._rule, watched, self._changes(memory, watched))
            self._denoising.calls += 1
            self._denoising.skipped += bool(reused)
            results = self._rest[reused]([*given, *memory.recall(self._points, reused)], weights)
            memory.remember(self._rule, self._points, reused, results[self._given :])
            return results[: self._given]

    def _changes(self, memory: BranchMemory, watched: Tensors) -> list[Change]:
        """Those of all ranks that run the call; what ranks hold alike counts as often in both sums."""
        if not watched:
            return []
        mine = memory.change(watched)
        everyone = [mine]
        if (count := self._communicator.mesh.size(self._dims)) > 1:
            everyone = [torch.empty_like(mine) for _ in range(count)]
            dist.all_gather(everyone, mine, group=self._communicator.group(self._dims))
        return [cast(Change, tuple(row)) for row in torch.stack(everyone).tolist()]

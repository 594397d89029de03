"""Every rank of a pipeline in this thread, step after step, with the buffers that patches leave for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir import buffer_ops as buffers
from xdit_ir.ir.buffer_ops import Keep, Read, Recall, Slot, Write
from xdit_ir.ir.interpret import State, Steps
from xdit_ir.ir.mesh import TIME
from xdit_ir.ir.program import Program, qualified
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.simulation.lockstep import RankInterpreter, RankObserver, Waiting, lockstep

Tensors = tuple[torch.Tensor, ...]


class BufferStore:
    """The buffers of one stage on one rank, for one request; knows in which step each patch wrote its part of each."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        self._written: dict[str, dict[int, int]] = {}
        self._kept: dict[str, tuple[int, torch.Tensor]] = {}

    def write(self, name: str, target: Write, value: torch.Tensor, step: int) -> None:
        """Put a patch's part in its place."""
        if name not in self._buffers:
            self._buffers[name] = value.new_zeros(target.shape)
        value = value[None] if value.dim() < len(target.shape) else value
        buffers.write(self._buffers[name], value, target.places)
        self._written.setdefault(name, {})[target.patch] = step

    def is_fresh(self, name: str, target: Read, step: int) -> bool:
        """Whether all patches have written in this step."""
        return all(self._written.get(name, {}).get(writer) == step for writer in target.writers)

    def read(self, name: str, target: Read, step: int, *, synchronous: bool) -> torch.Tensor:
        """What is there: of this step from patches up to the reader, of the last one from those behind it."""
        for writer in target.writers:
            due = step if synchronous or writer <= target.patch else step - 1
            found = self._written.get(name, {}).get(writer)
            if found != due:
                raise VerifyError(
                    f"buffer {name}: in step {step} patch {target.patch} reads what patch {writer} wrote in step "
                    f"{found}, not {due}"
                )
        return buffers.read(self._buffers[name], target)

    def keep(self, name: str, value: torch.Tensor, step: int) -> None:
        """Remember a value for the other patches of this step."""
        self._kept[name] = (step, value)

    def is_kept(self, name: str, step: int) -> bool:
        """Whether a value of this step is there."""
        return name in self._kept and self._kept[name][0] == step

    def recall(self, name: str, step: int) -> torch.Tensor:
        """What was kept in this step."""
        if not self.is_kept(name, step):
            raise VerifyError(f"{name} is recalled in step {step} before the first patch has computed it")
        return self._kept[name][1]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class PatchRank(RankInterpreter):
    """Runs one stage for one patch, in one step."""

    def __init__(
        self,
        rank: int,
        program: Program,
        state: State,
        device: torch.device,
        observe: RankObserver | None,
        moment: tuple[BufferStore, int, bool],
    ) -> None:
        super().__init__(rank, program, state, device, observe)
        self.store, self.step, self.synchronous = moment

    def operator(self, node: fx.Node, args: Any, kwargs: dict[str, Any], prefix: str) -> Steps:
        """The result of an operator, or what it does to a buffer."""
        if not isinstance(node.target, Slot):
            return (yield from super().operator(node, args, kwargs, prefix))
        target, name = node.target, qualified(prefix, node.target.slot)
        if isinstance(target, Write):
            if args[0].numel():
                self.store.write(name, target, args[0], self.step)
            return args[0]
        if isinstance(target, Keep):
            self.store.keep(name, args[0], self.step)
            return args[0]
        if isinstance(target, Recall):
            if self.synchronous:
                yield Waiting(lambda: self.store.is_kept(name, self.step), node, "recall")
            return self.store.recall(name, self.step)
        assert isinstance(target, Read)
        if self.synchronous:
            yield Waiting(lambda: self.store.is_fresh(name, target, self.step), node)
        return self.store.read(name, target, self.step, synchronous=self.synchronous)


class PipelineSimulation:
    """Consecutive steps of one request. The first ones are synchronous: every read waits for all patches."""

    def __init__(self, pipeline: Pipeline, state: State, device: torch.device) -> None:
        self.pipeline, self.state, self.device = pipeline, state, device
        self.stores = [[BufferStore() for _ in range(pipeline.mesh.world_size)] for _ in range(pipeline.stages)]
        self.steps = 0

    def step(self, inputs: Sequence[torch.Tensor], observe: RankObserver | None = None) -> list[Tensors]:
        """The outputs of every rank for the inputs of the next step; `observe` sees every value."""
        virtual = self.pipeline.virtual
        synchronous = self.steps < self.pipeline.warmup_steps
        everyone = range(virtual.world_size)
        by_patch = [[v for v in everyone if virtual.index(v, (TIME,)) == p] for p in range(self.pipeline.patches)]
        outputs: dict[int, Tensors] = {}
        for together in [everyone] if synchronous else by_patch:
            outputs |= self._through(together, inputs, observe, synchronous=synchronous)
        self.steps += 1
        ranks, last = range(self.pipeline.mesh.world_size), self.pipeline.patches - 1
        return [outputs[self.pipeline.virtual_rank(rank, last)] for rank in ranks]

    def _through(
        self,
        ranks: Sequence[int],
        inputs: Sequence[torch.Tensor],
        observe: RankObserver | None,
        *,
        synchronous: bool,
    ) -> dict[int, Tensors]:
        """Pass these virtual ranks through all stages."""
        messages: dict[int, Tensors] = dict.fromkeys(ranks, ())
        held: dict[int, dict[str, torch.Tensor]] = {rank: {} for rank in ranks}
        results: dict[int, Tensors] = {}
        for stage in range(self.pipeline.stages):
            parts = {rank: self.pipeline.part(stage, rank) for rank in ranks}
            steps = {}
            for rank, part in parts.items():
                moment = (self.stores[stage][self.pipeline.rank(stage, rank)], self.steps, synchronous)
                runner = PatchRank(rank, part.program, self.state, self.device, observe, moment)
                taken = [held[rank][name] for name in part.carried_in]
                steps[rank] = runner.graph(part.program.graph, [*inputs, *messages[rank], *taken])
            for rank, values in lockstep(steps).items():
                sends, carried_out = parts[rank].sends, parts[rank].carried_out
                messages[rank] = values[: len(sends)]
                held[rank] |= zip(carried_out, values[len(sends) :], strict=False)
                results[rank] = values[len(sends) + len(carried_out) :]
        return results

"""Every rank of a pipeline in this thread, step after step, by the very programs that ranks run.

`simulation.steps` has each patch for itself, as it was divided. What a rank runs is made from that: the patches of a
synchronous step woven into one program, and of the latents no more than what a patch takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xdit_ir.ir import ops
from xdit_ir.ir.interpret import State
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipefusion.rank_tasks import Held, Need, RankTasks, StageTask
from xdit_ir.simulation.lockstep import lockstep
from xdit_ir.simulation.steps import BufferStore, PatchRank

Tensors = tuple[torch.Tensor, ...]
Column = tuple[int, ...]
"""The ranks that pass patches to each other, by stage."""


class RankSimulation:
    """Consecutive steps of one request; the first ones are synchronous."""

    def __init__(self, pipeline: Pipeline, state: State, device: torch.device) -> None:
        self.pipeline, self.state, self.device = pipeline, state, device
        self.tasks = [RankTasks(pipeline, rank) for rank in range(pipeline.mesh.world_size)]
        self.columns = sorted({tasks.ranks() for tasks in self.tasks})
        self.stores = {(stage, tasks.rank): BufferStore() for tasks in self.tasks for stage in tasks.stages}
        self.steps = 0

    def step(self, inputs: Sequence[torch.Tensor]) -> list[Tensors]:
        """The outputs of every rank for the inputs of the next step."""
        synchronous = self.steps < self.pipeline.warmup_steps and self.pipeline.patches > 1
        results: dict[Column, list[torch.Tensor]] = {column: [] for column in self.columns}
        for patch in (None,) if synchronous else range(self.pipeline.patches):
            for column, found in self._through(patch, inputs).items():
                results[column] += found
        self.steps += 1
        return [tasks.assembled(results[tasks.ranks()], inputs) for tasks in self.tasks]

    def _through(self, patch: int | None, inputs: Sequence[torch.Tensor]) -> dict[Column, Tensors]:
        """Pass a patch, or all of them together, through all stages."""
        messages: dict[Column, Tensors] = dict.fromkeys(self.columns, ())
        held: dict[Column, dict[Held, torch.Tensor]] = {column: {} for column in self.columns}
        for stage in range(self.pipeline.stages):
            running = {column[stage]: column for column in self.columns}
            tasks = {rank: self._task(rank, stage, patch) for rank in running}
            steps = {}
            for rank, column in running.items():
                task, moment = tasks[rank], (self.stores[stage, rank], self.steps, patch is None)
                given = [self._input(rank, need, inputs) for need in task.needs]
                given += [messages[column][one] if isinstance(one, int) else held[column][one] for one in task.feed]
                runner = PatchRank(rank, task.program, self.state, self.device, None, moment)
                steps[rank] = runner.graph(task.program.graph, given)
            for rank, values in lockstep(steps).items():
                task, column = tasks[rank], running[rank]
                messages[column] = values
                held[column] |= zip(task.carried_out, values[len(task.sends) :], strict=False)
        return messages

    def _task(self, rank: int, stage: int, patch: int | None) -> StageTask:
        tasks = self.tasks[rank]
        return tasks.synchronous[stage] if patch is None else tasks.displaced[stage, patch]

    def _input(self, rank: int, need: Need, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        x = inputs[self.tasks[rank].inputs.index(need.name)]
        if need.patches is None:
            return x
        cut = self.tasks[rank].latents[need.name]
        return ops.take(x, cut.dim, cut.joined(need.patches).runs)

"""The code of a rank's stages, with the constants and the buffers that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from xdit_ir.emission.codegen import Code, EmittedBody
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors
from xdit_ir.ir.named_tensors import constants_on
from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipefusion.rank_tasks import RankTasks, StageTask
from xdit_ir.pipelined.memory import Memories, Memory
from xdit_ir.pipelined.schedule import StageRun

Key = tuple[int, int | None]
"""A stage, and a patch, or None for all of them."""


@dataclass(frozen=True, eq=False)
class StageCode:
    """A stage's task with its code."""

    task: StageTask
    code: Code

    def __call__(self, inputs: Tensors, state: Tensors) -> Sequence[torch.Tensor]:
        """Run it; `state` with the buffers behind it."""
        outputs: Sequence[torch.Tensor] = self.code.run.forward(*inputs, *state)
        return outputs


class RankCode:
    """All that one rank runs, and the `memories` in which requests keep what it writes."""

    def __init__(self, tasks: RankTasks, context: RankContext) -> None:
        self._stages = {key: StageCode(task, context.code(task.program)) for key, task in _keyed(tasks)}
        names = dict.fromkeys(name for each in self._stages.values() for name in each.code.constants)
        self._constants = constants_on(tasks.pipeline.program, names, context.device)
        self.memories = Memories(self._buffer_types(tasks.stages), context.device)
        self._pool = torch.cuda.graph_pool_handle() if context.execution.cuda_graph else None

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks of all stages and patches."""
        found: dict[str, EmittedBody] = {}
        for (stage, patch), each in self._stages.items():
            where = f"stage {stage}, {'all patches' if patch is None else f'patch {patch}'}"
            found |= {f"{name} ({where})": body for name, body in each.code.bodies.items()}
        return found

    def task(self, item: StageRun) -> StageTask:
        """What is run."""
        return self._stages[item.stage, item.patch].task

    def run(
        self, item: StageRun, memory: Memory, inputs: Tensors, weights: Mapping[str, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """The outputs of a task; its buffers are those of a request's `memory`."""
        each = self._stages[item.stage, item.patch]
        state = [weights[name] for name in each.code.weights]
        state += [self._constants[name] for name in each.code.constants]
        return memory.run((item.stage, item.patch), list(each.code.slots), each, self._pool)(inputs, state)

    def _buffer_types(self, stages: Sequence[int]) -> dict[int, dict[str, TensorSpec]]:
        found: dict[int, dict[str, TensorSpec]] = {stage: {} for stage in stages}
        for (stage, _), each in self._stages.items():
            for name, spec in each.code.slots.items():
                if spec is not None:
                    found[stage].setdefault(name, spec)
        return found


def _keyed(tasks: RankTasks) -> Iterator[tuple[Key, StageTask]]:
    yield from tasks.displaced.items()
    if tasks.pipeline.patches > 1:
        yield from (((stage, None), task) for stage, task in tasks.synchronous.items())

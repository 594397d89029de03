"""The code of a rank's stages, with the constants and the buffers that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from xdit_ir.emission.code_writer import EmittedBody
from xdit_ir.emission.codegen import Code
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors
from xdit_ir.ir.program import CONSTANT, TensorSpec
from xdit_ir.pipefusion.rank_tasks import RankTasks, StageTask
from xdit_ir.pipelined.memory import Memories, Recorded, StageBuffers
from xdit_ir.pipelined.schedule import StageRun

Key = tuple[int, int | None]
"""A stage, and a patch, or None for all of them."""


@dataclass(frozen=True, eq=False)
class StageCode:
    """A stage's task with its code."""

    task: StageTask
    code: Code


class RankCode:
    """All that one rank runs, and the `memories` in which requests keep what it writes."""

    def __init__(self, tasks: RankTasks, context: RankContext) -> None:
        self._stages = {key: StageCode(task, context.code(task.program)) for key, task in _keyed(tasks)}
        self._constants = _constants(self._stages, context.device)
        self.memories = Memories(self._buffer_types(tasks.stages), context.device)
        self._compiled, self._recorded = context.execution.compile, Recorded.of(context)

    @property
    def bodies(self) -> Mapping[str, EmittedBody]:
        """The shared blocks of all stages and patches."""
        found: dict[str, EmittedBody] = {}
        for (stage, patch), each in self._stages.items():
            where = f"stage {stage}, {'all patches' if patch is None else f'patch {patch}'}"
            found |= {f"{name} ({where})": body for name, body in each.code.bodies.items()}
        return found

    @property
    def execution(self) -> str:
        """How stages run, and what does not run as it should."""
        failures = dict.fromkeys(text for each in self._stages.values() for text in each.code.failures)
        recorded = [] if self._recorded is None else ["stages recorded"]
        return "; ".join(["compiled" if self._compiled else "eagerly", *recorded, *failures])

    def task(self, item: StageRun) -> StageTask:
        """What is run."""
        return self._stages[item.stage, item.patch].task

    def run(
        self, item: StageRun, memory: StageBuffers, inputs: Tensors, weights: Mapping[str, torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """The outputs of a task; its buffers are those of a request's `memory`."""
        key = (item.stage, item.patch)
        code = self._stages[key].code
        state = [weights[name] for name in code.weights]
        state += self._constants[key]
        return memory.run(key, code, inputs, state, self._recorded)

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


def _constants(stages: Mapping[Key, StageCode], device: torch.device) -> dict[Key, Tensors]:
    """Those of each stage; what several have lies in memory once."""
    shared: dict[int, torch.Tensor] = {}
    found: dict[Key, Tensors] = {}
    for key, each in stages.items():
        held = [each.code.program.constants[name.removeprefix(f"{CONSTANT}.")] for name in each.code.constants]
        moved = zip(held, each.code.constant_tensors(device), strict=True)
        found[key] = [shared.setdefault(id(original), tensor) for original, tensor in moved]
    return found

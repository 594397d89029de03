"""What a rank of a pipeline keeps from step to step: the buffers of its stages, and CUDA graphs that use them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xdit_ir.emission.codegen import Code
from xdit_ir.emission.context import RankContext
from xdit_ir.emission.execution import Tensors
from xdit_ir.emission.graph_pool import GraphPool
from xdit_ir.emission.recording import Recording
from xdit_ir.ir.program import TensorSpec

Types = Mapping[int, Mapping[str, TensorSpec]]


@dataclass(frozen=True, eq=False)
class Recorded:
    """How stages are recorded: the memory of all graphs, and whether nothing else will do."""

    pool: GraphPool
    forced: bool

    @staticmethod
    def of(context: RankContext) -> Recorded | None:
        """None: they are not."""
        execution = context.execution
        return Recorded(context.graph_pool, execution.forced) if execution.cuda_graph else None


@dataclass(eq=False)
class StageBuffers:
    """Buffers by stage and name; `recordings` by stage and patch, as a graph knows its buffers by their addresses."""

    buffers: Mapping[int, Mapping[str, torch.Tensor]]
    recordings: dict[Any, Recording] = field(default_factory=dict)

    def run(
        self, key: tuple[int, int | None], code: Code, inputs: Tensors, weights: Tensors, recorded: Recorded | None
    ) -> Sequence[torch.Tensor]:
        """What the code of a stage gives with the buffers of this memory."""
        state = [*weights, *(self.buffers[key[0]][name] for name in code.slots)]
        if recorded is None:
            return code([*inputs, *state])
        if key not in self.recordings:
            self.recordings[key] = Recording(code, recorded.pool, forced=recorded.forced)
        return self.recordings[key](inputs, state)


@dataclass(eq=False)
class Memories:
    """Gives each request memory, and takes it back when nothing refers to who had it."""

    types: Types
    device: torch.device
    _made: list[tuple[weakref.ref[object], StageBuffers]] = field(default_factory=list)

    def lend(self, owner: object) -> StageBuffers:
        """Memory full of zeros: nothing of a request is left to the next one."""
        for place, (last, memory) in enumerate(self._made):
            if last() is None:
                for buffer in (buffer for stage in memory.buffers.values() for buffer in stage.values()):
                    buffer.zero_()
                self._made[place] = weakref.ref(owner), memory
                return memory
        memory = StageBuffers(
            {
                stage: {name: zeros(spec, self.device) for name, spec in types.items()}
                for stage, types in self.types.items()
            }
        )
        self._made.append((weakref.ref(owner), memory))
        return memory

    def forget(self) -> None:
        """Free what was recorded."""
        for _, memory in self._made:
            for recording in memory.recordings.values():
                recording.forget()


def zeros(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """A tensor of this type."""
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)

"""What a rank of a pipeline keeps from step to step: the buffers of its stages, and CUDA graphs that use them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from xdit_ir.emission.execution import Recording, Tensors
from xdit_ir.ir.program import TensorSpec

Run = Callable[[Tensors, Tensors], Sequence[torch.Tensor]]
Types = Mapping[int, Mapping[str, TensorSpec]]


@dataclass(eq=False)
class Memory:
    """Buffers by stage and name; `recordings` by stage and patch, as a graph knows its buffers by their addresses."""

    buffers: Mapping[int, Mapping[str, torch.Tensor]]
    recordings: dict[Any, Recording] = field(default_factory=dict)

    def run(self, key: tuple[int, int | None], names: Sequence[str], run: Run, pool: Any) -> Run:
        """`run` with the buffers of a stage appended to its weights; recorded where there is a `pool`."""
        buffers = [self.buffers[key[0]][name] for name in names]
        if pool is not None:
            if key not in self.recordings:
                self.recordings[key] = Recording(run, pool)
            run = self.recordings[key]
        return lambda inputs, weights: run(inputs, [*weights, *buffers])


@dataclass(eq=False)
class Memories:
    """Gives each request memory, and takes it back when nothing refers to who had it."""

    types: Types
    device: torch.device
    _made: list[tuple[weakref.ref[object], Memory]] = field(default_factory=list)

    def lend(self, owner: object) -> Memory:
        """Memory full of zeros: nothing of a request is left to the next one."""
        for place, (last, memory) in enumerate(self._made):
            if last() is None:
                for buffer in (buffer for stage in memory.buffers.values() for buffer in stage.values()):
                    buffer.zero_()
                self._made[place] = weakref.ref(owner), memory
                return memory
        memory = Memory(
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

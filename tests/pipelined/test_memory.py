"""Memory of requests: full of zeros for each, used again when nobody has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xdit_ir.ir.program import TensorSpec
from xdit_ir.pipelined.memory import Memories
from xdit_ir.pipelined.requests import GuidanceBranch


def test_memory_is_used_again_without_what_was_in_it() -> None:
    memories = Memories({3: {"kv": TensorSpec((2, 2), torch.float32)}}, torch.device("cpu"))
    first, second = GuidanceBranch(None), GuidanceBranch(None)
    mine, other = memories.lend(first), memories.lend(second)
    assert mine is not other, "both are in use"
    mine.buffers[3]["kv"].fill_(1.0)
    del first
    again = memories.lend(GuidanceBranch(None))
    assert again is mine and not again.buffers[3]["kv"].any()


@dataclass
class Types:
    """Code that gives the types of what it is given."""

    slots: dict[str, None]

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.dtype]:
        return [x.dtype for x in tensors]


def test_a_stage_runs_with_its_buffers_behind_its_weights() -> None:
    memory = Memories({0: {"a": TensorSpec((1,), torch.int64), "b": TensorSpec((1,), torch.bool)}}, torch.device("cpu"))
    lent = memory.lend(GuidanceBranch(None))
    given = [torch.zeros(1, dtype=dtype) for dtype in (torch.int32, torch.int8)]
    code = Types({"b": None, "a": None})
    assert lent.run((0, None), code, given[:1], given[1:], None) == [  # type: ignore[arg-type, comparison-overlap]
        *(torch.int32, torch.int8, torch.bool, torch.int64)
    ]

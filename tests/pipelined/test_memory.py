"""Memory of requests: full of zeros for each, used again when nobody has it."""

from __future__ import annotations

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


def test_a_stage_runs_with_its_buffers_behind_its_weights() -> None:
    memory = Memories({0: {"a": TensorSpec((1,), torch.int64), "b": TensorSpec((1,), torch.bool)}}, torch.device("cpu"))
    lent = memory.lend(GuidanceBranch(None))
    run = lent.run((0, None), ["b", "a"], lambda inputs, state: [x.dtype for x in (*inputs, *state)], None)  # type: ignore[misc]
    given = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int8)
    assert run([given[0]], [given[1]]) == [torch.int32, torch.int8, torch.bool, torch.int64]

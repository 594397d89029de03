"""Parts of weights that ranks fetch from each other's memory."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standing_in import Here

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.code_writer import How
from xdit_ir.emission.codegen import generate
from xdit_ir.emission.fold import fold_constants
from xdit_ir.transport import peer_ops
from xdit_ir.transport.pulls import AwaitPull, StartPull


class Stream:
    """Does at once what it is told, and says what was waited for."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def wait_stream(self, other: object) -> None:
        self.said.append("begins behind what was before")

    def record_event(self) -> str:
        return "there"

    def wait_event(self, event: str) -> None:
        self.said.append(event)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_all_parts_in_their_order(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    parts = [torch.randn(2, 3) for _ in range(3)]
    handle = SimpleNamespace(world_size=3, buffer_ptrs=[part.data_ptr() for part in parts])

    def met(x: torch.Tensor, group: str) -> Any:
        assert x is parts[rank] and group == "weights"
        return handle

    monkeypatch.setattr(peer_ops, "symmetric", met)
    monkeypatch.setattr(peer_ops, "copy_bytes", lambda target, source, size, _: ctypes.memmove(target, source, size))
    monkeypatch.setattr(peer_ops, "wires", lambda device, members, what: [Stream(said) for _ in range(members)])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("filled"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(said))
    start = StartPull("weights", rank, (6, 3))
    for _ in range(2):
        assert torch.equal(AwaitPull()(*start(parts[rank])), torch.cat(parts))
    assert said.count("filled") == 1, "parts do not change, so one meeting is enough"
    assert said.count("begins behind what was before") == said.count("there") == 2 * 3


def test_only_parts_that_stay_where_they_are_are_fetched() -> None:
    traced = xir.trace(*models.load("flux.1-dev:tiny"))
    for streamed in (False, True):
        parallel = traced.parallelize(ulysses=2, shard_weights=True, stream_weights=streamed)
        program = fold_constants(parallel.rank(0))
        counts = {}
        for fetched in (False, True):
            code = generate(program, Here(parallel.mesh), torch.device("cpu"), How(pulls=fetched))  # type: ignore[arg-type]
            kinds = [type(module).__name__ for module in code.run.children()]
            counts[fetched] = kinds.count("SendParts"), kinds.count("StartPull"), kinds.count("AwaitPull")
        gathers = counts[False][0]
        assert gathers > 3 and counts[False] == (gathers, 0, 0)
        assert counts[True] == ((gathers, 0, 0) if streamed else (0, gathers, gathers))

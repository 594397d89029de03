"""The memory of CUDA graphs, with what stands in for PyTorch's graphs and allocator."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from xdit_ir.emission.graph_pool import GraphPool


class Graph:
    """Knows its pool."""

    pool: int

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        self.pool = pool

    def capture_end(self) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> GraphPool:
    count = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(count))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: None, raising=False)
    generator = SimpleNamespace(graphsafe_set_state=lambda state: None, clone_state=lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    return GraphPool(torch.device("cuda", 0))


def recorded(pool: GraphPool) -> Graph:
    graph = Graph()
    with pool.recording(graph, 0):  # type: ignore[arg-type]
        pass
    return graph


def test_graphs_share_memory(pool: GraphPool) -> None:
    one = recorded(pool)
    assert recorded(pool).pool == one.pool == recorded(pool).pool


def test_memory_whose_graphs_are_all_gone_is_not_used_again(pool: GraphPool) -> None:
    """The allocator gives it back with the last of them, and refuses it later."""
    found = [recorded(pool).pool for _ in range(3)]
    assert len(set(found)) == 3


def test_memory_of_a_recording_that_failed_is_not_used_again(pool: GraphPool) -> None:
    before = recorded(pool)
    with pytest.raises(KeyError), pool.recording(Graph(), 0):  # type: ignore[arg-type]
        raise KeyError
    after = recorded(pool)
    assert after.pool != before.pool == 0
    assert recorded(pool).pool == after.pool

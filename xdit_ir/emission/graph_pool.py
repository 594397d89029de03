"""The memory of CUDA graphs, and what to do after a recording that failed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

ENTRIES = 4  # more than the allocator may have for one recording


class GraphPool:
    """Memory that graphs share of which no two are replayed at the same time, and whose results are copied out.

    All are recorded on one stream, as the allocator gives what was freed to the same stream only.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def aside(self) -> Iterator[int]:
        """On a stream beside the current one, as recording wants it; each waits for the other. Gives the device."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield self._stream.device_index
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph, device: int) -> Iterator[None]:
        """Record the current stream, whatever other threads do; if that fails, generators and memory are as before."""
        torch.cuda.synchronize()
        if not self._graphs:  # the allocator gives memory back with the last graph, and may refuse its handle then
            self._handle = torch.cuda.graph_pool_handle()
        try:
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            yield
            graph.capture_end()
        except BaseException:
            _put_back(graph, self._handle, device)
            self._graphs.clear()  # the allocator may take their memory to be recorded to still
            raise
        self._graphs.add(graph)


def _put_back(graph: torch.cuda.CUDAGraph, pool: Any, device: int) -> None:
    """A recording that was invalidated leaves allocator and generator in the middle of it
    (https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/cuda/CUDAGraph.cpp)."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):
        for _ in range(ENTRIES):
            torch._C._cuda_endAllocateToPool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())

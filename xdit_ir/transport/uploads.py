"""Weights that lie in the host's memory: room for them there, and their way to the device, on a stream of its own."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable

import torch

from xdit_ir.errors import MismatchError
from xdit_ir.ir.program import Stored
from xdit_ir.ir.stored import Room, held_spec, room_on
from xdit_ir.transport.collectives import Exchange


class StartUpload(Exchange):
    """The first half of an upload: start it, when all is done that was begun before, which may use the memory that it
    gets. A CUDA graph can hold it, as what it reads stays where it is."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        super().__init__()
        self._stream = stream

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """`x` in the host's memory -> the same on the device, which is on its way, and what tells when it is there."""
        if self._stream is None:
            return x.clone(), None
        copy = torch.empty(x.shape, dtype=x.dtype, device=self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(x, non_blocking=True)
            return copy, self._stream.record_event()


class AwaitUpload(Exchange):
    """The second half: what comes behind it on the current stream finds all there."""

    def forward(self, copy: torch.Tensor, there: torch.cuda.Event | None) -> torch.Tensor:
        """What `StartUpload` gave -> the tensor on the device."""
        if there is not None:
            torch.cuda.current_stream(copy.device).wait_event(there)
        return copy


def upload_stream(device: torch.device) -> torch.cuda.Stream | None:
    """For the uploads of a program: a stream beside that which computes; on a CPU, copies are made at once."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def room_beside(device: torch.device) -> Room:
    """Room on a device for what is to lie there, and in pinned memory of its host for what is to lie with that."""
    here, host = room_on(device), room_on(torch.device("cpu"))
    if device.type != "cuda":
        return host
    return lambda stored: pinned(stored, device) if stored.on_host else here(stored)


def pinned(stored: Stored, device: torch.device) -> torch.Tensor:
    """Pages of their own, locked in memory as long as some tensor uses them. PyTorch's allocator would round up to a
    power of two, half as much again of all weights."""
    size = held_spec(stored).nbytes
    if not size:
        return torch.zeros(0, dtype=torch.uint8)
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    found = own_pages(size, runtime.cudaHostUnregister)
    with torch.cuda.device(device):
        error = runtime.cudaHostRegister(found.data_ptr(), size, 0)
    if int(error) != 0:
        raise MismatchError(
            f"stream_weights=True: {size / 2**20:.0f} MiB of the host's memory, for {stored.members[0][0]} and what "
            f"lies with it, cannot be pinned ({error}); expected that much free memory and a limit of locked memory "
            "(ulimit -l) that allows it, nearest legal: more ranks, which divide it, or shard_weights=True"
        )
    return found


def own_pages(size: int, before_end: Callable[[int], object]) -> torch.Tensor:
    """Zeros in pages that nothing else lies in; `before_end` gets their address before they are given back, when the
    last tensor that uses them is gone."""
    pages = (ctypes.c_uint8 * size).from_buffer(mmap.mmap(-1, size))
    weakref.finalize(pages, before_end, ctypes.addressof(pages)).atexit = False
    return torch.frombuffer(pages, dtype=torch.uint8)

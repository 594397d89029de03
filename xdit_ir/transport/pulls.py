"""Gathers of what ranks hold in parts for good: each fetches the parts of others from their memory, by copy engines.

Weights in parts are written once, before anybody reads them, so that no rank need be asked. A copy engine needs no
multiprocessor, where the kernel of an all-gather takes some from the blocks that it runs beside. Copies inside a GPU
do need them, so what a rank has itself is read where it lies (`own-parts`) as far as can be.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.program import SPEC, Stored
from xdit_ir.ir.stored import Room, held_spec
from xdit_ir.transport.collectives import Exchange
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.fetches import Copy, Fetch
from xdit_ir.transport.uploads import room_beside

CHUNK = 2**24  # bytes of a copy within a GPU: its processors make it, and other kernels want to run in between


def pull_halves(node: fx.Node, communicator: Communicator) -> tuple[StartPull, AwaitPull]:
    """The modules that start and await a gather on this process's rank."""
    target: Any = node.target
    group = communicator.among(target.group, beside=True).group_name
    at = target.group.index(communicator.rank)
    return StartPull(group, at, target.exchange.shape, own_bytes(node, at), target.first), AwaitPull()


def own_bytes(node: fx.Node, at: int) -> tuple[range, ...]:
    """Which bytes of this rank's part, which is number `at` of those that are gathered, are read out of all."""
    [part] = operands(node)
    size = part.meta[SPEC].nbytes
    if any(user.target is not ops.unpack for user in node.users):
        return (range(size),)
    starts = {operator.sub(user.args[1], at * size): user.meta[SPEC].nbytes for user in node.users}
    found = (range(max(at, 0), min(at + length, size)) for at, length in sorted(starts.items()))
    return tuple(one for one in found if one)


class StartPull(Exchange):
    """The first half: start to copy all parts, when all is done that was begun before, which may use the memory that
    they get; `first` of `ALL` at once, more behind exchanges of the block that runs meanwhile. A CUDA graph can hold
    it, as parts stay where they are.

    Its first call is collective: there the members of `group`, of which this rank is number `at`, tell each other where
    their parts are, and that they are filled. Of this rank's own part the bytes `own` are copied.
    """

    def __init__(self, group: str, at: int, shape: tuple[int, ...], own: tuple[range, ...], first: int) -> None:
        super().__init__()
        self._group, self._at, self._shape, self._own, self._first = group, at, shape, own, first
        self._met = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Fetch]:
        """`x`, this rank's part, in symmetric memory -> all parts one behind the other, which are on their way, and
        what tells when they are there."""
        from xdit_ir.transport.peer_ops import copy_bytes, others, symmetric, wires  # registers operators

        if not self._met:
            torch.cuda.synchronize(x.device)
            self._met = True
        handle = symmetric(x, self._group)
        offset, size = x.data_ptr() - handle.buffer_ptrs[self._at], x.numel() * x.element_size()
        whole = torch.empty(self._shape, dtype=x.dtype, device=x.device)
        main, streams = torch.cuda.current_stream(x.device), wires(x.device, handle.world_size, "weights")
        fetch = Fetch(whole, copy_bytes)
        for member in others(handle):
            fetch.add(whole.data_ptr() + member * size, handle.buffer_ptrs[member] + offset, size, streams[member])
        fetch.go_on(self._first, [main])
        if self._own:
            streams[self._at].wait_stream(main)
            self._copy_own(x.data_ptr(), whole.data_ptr() + self._at * size, streams[self._at], copy_bytes)
            fetch.there.append(streams[self._at].record_event())
        return whole, fetch

    def _copy_own(self, source: int, target: int, stream: torch.cuda.Stream, copy: Copy) -> None:
        for start, size in ((start, min(CHUNK, run.stop - start)) for run in self._own for start in run[::CHUNK]):
            copy(target + start, source + start, size, stream)


class AwaitPull(Exchange):
    """The second half: what comes behind it on the current stream finds all there."""

    def forward(self, whole: torch.Tensor, fetch: Fetch) -> torch.Tensor:
        """What `StartPull` gave -> the whole."""
        for event in fetch.finish():
            torch.cuda.current_stream(whole.device).wait_event(event)
        return whole


def room_for_peers(device: torch.device) -> Room:
    """Room on a device that other GPUs can read, for what is to lie there; else as `room_beside`."""
    beside = room_beside(device)

    def room(stored: Stored) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        size = held_spec(stored).nbytes
        if stored.on_host or not size:
            return beside(stored)
        return symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()

    return room

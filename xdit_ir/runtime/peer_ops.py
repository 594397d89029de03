"""Two operators that move pieces between GPUs by their copy engines, over symmetric memory; importing registers them.

A copy engine needs no multiprocessor, so an exchange runs beside a matrix product that fills the GPU, where a
collective's kernel would wait for it. torch.compile keeps both operators as they are; see `xdit_ir.runtime.mailbox`
for who may write where and when.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from cuda.bindings import runtime as cuda

TIMEOUT_MS = 600_000  # as NCCL's: a peer that died must not hang the others for ever
SLOTS = 3  # per channel
HEADER = 64  # bytes at the start of a workspace; the first word is FLAG, to be copied where a peer waits
FLAG = 1
FIELDS = 7  # of one copy in `plan`: member, source, source pitch, target, target pitch, width, height


@torch.library.custom_op("xdit_ir::peer_put", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def peer_put(
    x: torch.Tensor,
    workspace: torch.Tensor,
    slot: torch.Tensor,
    group: str,
    channel: int,
    slots: list[int],
    plan: list[int],
) -> torch.Tensor:
    """Start copies of pieces of `x` (dense) into the members' workspaces, and tell each when its piece is there.

    Args:
        workspace: uint8, symmetric over `group`, which starts with a header.
        slot: int64 `[1]` on the CPU, which of the places `slots` (byte offsets) to write to.
        channel: what the receivers wait for is `SLOTS * channel + slot`.
        plan: `FIELDS` numbers per copy.

    Returns:
        An empty tensor, for `peer_wait`.
    """
    handle = symmetric_memory.rendezvous(workspace, group)
    at = int(slot.item())
    own, *wires = _streams(x.device, handle.world_size)
    main = torch.cuda.current_stream(x.device)
    for stream in (own, *wires):
        stream.wait_stream(main)
    for member, source, source_pitch, target, target_pitch, width, height in _rows(plan):
        stream = own if member == handle.rank else wires[member]
        place = handle.buffer_ptrs[member] + slots[at] + target
        _copy(place, target_pitch, x.data_ptr() + source, source_pitch, width, height, stream)
    word = 4 * (handle.world_size * (SLOTS * channel + at) + handle.rank)
    for member in _others(handle):
        flag = handle.signal_pad_ptrs[member] + word
        _copy(flag, 4, handle.buffer_ptrs[handle.rank], 4, 4, 1, wires[member])
    return x.new_empty(0)


@peer_put.register_fake
def _(
    x: torch.Tensor,
    workspace: torch.Tensor,
    slot: torch.Tensor,
    group: str,
    channel: int,
    slots: list[int],
    plan: list[int],
) -> torch.Tensor:
    return x.new_empty(0)


@torch.library.custom_op("xdit_ir::peer_wait", mutates_args=())
def peer_wait(
    x: torch.Tensor,
    token: torch.Tensor,
    workspace: torch.Tensor,
    slot: torch.Tensor,
    group: str,
    channel: int,
    slots: list[int],
    shape: list[int],
) -> torch.Tensor:
    """What all members put into this rank's slot, once it is there.

    Args:
        x, token: what `peer_put` was given and gave; holding `x` keeps its memory until it has been read.

    Returns:
        A tensor of `shape` that lies in the workspace: nobody may write to it.
    """
    handle = symmetric_memory.rendezvous(workspace, group)
    at = int(slot.item())
    main = torch.cuda.current_stream(x.device)
    for stream in _streams(x.device, handle.world_size):
        main.wait_stream(stream)
    for member in _others(handle):
        handle.wait_signal(member, SLOTS * channel + at, TIMEOUT_MS)
    return handle.get_buffer(handle.rank, shape, x.dtype, slots[at] // x.dtype.itemsize)  # type: ignore[no-any-return]


@peer_wait.register_fake
def _(
    x: torch.Tensor,
    token: torch.Tensor,
    workspace: torch.Tensor,
    slot: torch.Tensor,
    group: str,
    channel: int,
    slots: list[int],
    shape: list[int],
) -> torch.Tensor:
    return x.new_empty(shape)


def open_workspace(nbytes: int, device: torch.device, group: str) -> torch.Tensor:
    """A workspace of this size on every member of the group, which must all call this."""
    workspace = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    workspace[:HEADER].view(torch.int32).fill_(FLAG)
    handle = symmetric_memory.rendezvous(workspace, group)
    torch.cuda.current_stream(device).synchronize()
    handle.barrier(0, TIMEOUT_MS)
    return workspace


def _others(handle: Any) -> Iterator[int]:
    """The other members, each rank beginning with its next one, so that no receiver gets everything at once."""
    return ((handle.rank + step) % handle.world_size for step in range(1, handle.world_size))


def _rows(plan: Sequence[int]) -> Iterator[Sequence[int]]:
    return (plan[start : start + FIELDS] for start in range(0, len(plan), FIELDS))


def _copy(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: torch.cuda.Stream
) -> None:
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    (status,) = cuda.cudaMemcpy2DAsync(
        target, target_pitch, source, source_pitch, width, height, kind, stream.cuda_stream
    )
    if status != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"cudaMemcpy2DAsync of {height} rows of {width} bytes: {status}")


@functools.cache
def _streams(device: torch.device, members: int) -> tuple[torch.cuda.Stream, ...]:
    """One stream for copies at home, and one per member, so that copies to several run side by side."""
    return tuple(torch.cuda.Stream(device) for _ in range(members + 1))

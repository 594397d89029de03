"""Two operators that move pieces between GPUs by their copy engines, over symmetric memory; importing registers them.

A copy engine needs no multiprocessor, so an exchange runs beside a matrix product that fills the GPU, where a
collective's kernel would wait for it. torch.compile keeps both operators as they are, and where a rank needs nothing
of what they give too: others wait for it. See `xdit_ir.transport.mailbox` for who may write where and when.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch.fx import has_side_effect

from xdit_ir.transport.fetches import ongoing
from xdit_ir.transport.keeping import keeping
from xdit_ir.transport.workspace import HEADER, PADS, SIGNALS, read_letter

TIMEOUT_MS = 600_000  # as NCCL's: a peer that died must not hang the others for ever
FLAG = 1  # the first word of a workspace, to be copied where a peer waits
FIELDS = 7  # of one copy in a plan: member, source, source pitch, target, target pitch, width, height


@torch.library.custom_op("xdit_ir::peer_put", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def peer_put(
    x: torch.Tensor,
    after: list[torch.Tensor],
    workspace: torch.Tensor,
    letter: torch.Tensor,
    group: str,
    place: int,
    tell_self: bool,
) -> torch.Tensor:
    """Start copies of pieces of `x` (dense) into the members' workspaces, and tell each when its piece is there.

    Behind them goes on what copy engines fetch beside.

    Args:
        after: what was started or awaited before, for the order only.
        workspace: uint8, symmetric over `group`, which starts with a header.
        letter: int64 on the CPU, see `Mailbox.letter`; its `place` says what is copied where.
        tell_self: raise a flag here too when everything has been sent.

    Returns:
        An empty tensor for `peer_wait`, which keeps `x` in memory: a compiler may have made `x` for this call alone.
    """
    handle = symmetric(workspace, group)
    number, offset, behind, plan = read_letter(letter, place)
    main = torch.cuda.current_stream(x.device)
    ways = wires(x.device, handle.world_size)
    for member in others(handle):
        ways[member].wait_stream(main)
    for member, source, source_pitch, target, target_pitch, width, height in _rows(plan):
        stream = main if member == handle.rank else ways[member]
        there = handle.buffer_ptrs[member] + offset + target
        _copy(there, target_pitch, x.data_ptr() + source, source_pitch, width, height, stream)
    for member in others(handle):
        raise_flag(handle, member, number, handle.rank, ways[member])
        if tell_self:
            raise_flag(handle, handle.rank, number + SIGNALS // handle.world_size, member, ways[member])
    for fetch in ongoing(x.device):
        fetch.go_on(behind, [ways[member] for member in others(handle)])
    return keeping(x)


@peer_put.register_fake
def _(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.uint8)


@torch.library.custom_op("xdit_ir::peer_wait", mutates_args=())
def peer_wait(
    held: list[torch.Tensor],
    workspace: torch.Tensor,
    letter: torch.Tensor,
    group: str,
    place: int,
    shape: list[int],
    dtype: torch.dtype,
    sent: bool,
    patience: int,
) -> torch.Tensor:
    """What all members put into this rank's slot, once it is there.

    Args:
        held: what `peer_put` gave, here and before, of what has surely been sent when this is over; and what was
            started or awaited before, for the order only.
        sent: wait also until everything has been sent, see `tell_self` there.
        patience: milliseconds after which a kernel that waits gives up, with an error of the device.

    Returns:
        A tensor of `shape` and `dtype` that lies in the workspace: nobody may write to it.
    """
    handle = symmetric(workspace, group)
    number, offset, *_ = read_letter(letter, place)
    for member in others(handle):
        handle.wait_signal(member, number, patience)
        if sent:
            handle.wait_signal(member, number + SIGNALS // handle.world_size, patience)
    result: torch.Tensor = handle.get_buffer(handle.rank, shape, dtype, offset // dtype.itemsize)
    return result


@peer_wait.register_fake
def _(held: list[torch.Tensor], *rest: Any) -> torch.Tensor:
    *_, shape, dtype, _, _ = rest
    return held[0].new_empty(shape, dtype=dtype)


has_side_effect(torch.ops.xdit_ir.peer_put.default)
has_side_effect(torch.ops.xdit_ir.peer_wait.default)


def join(workspace: torch.Tensor, group: str) -> None:
    """Make the current stream wait for everything that was started: at the end of a forward, or of its recording."""
    handle = symmetric(workspace, group)
    main = torch.cuda.current_stream(workspace.device)
    ways = wires(workspace.device, handle.world_size)
    for member in others(handle):
        main.wait_stream(ways[member])


def open_workspace(nbytes: int, device: torch.device, group: str) -> torch.Tensor:
    """A workspace of this size on every member of the group, which must all call this."""
    need = 4 * PADS * SIGNALS
    if symmetric_memory.get_signal_pad_size() < need:
        symmetric_memory.set_signal_pad_size(need)
    workspace = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)
    workspace[:HEADER].view(torch.int32).fill_(FLAG)
    torch.cuda.current_stream(device).synchronize()
    meet(workspace, group)
    return workspace


def meet(workspace: torch.Tensor, group: str) -> None:
    """Make the current stream wait until those of all members are here, and so have awaited whatever was sent to them.

    By words of the signal pad that no exchange uses: a member that goes on may send at once.
    """
    handle = symmetric(workspace, group)
    handle.barrier((PADS - 1) * SIGNALS // handle.world_size, TIMEOUT_MS)


def symmetric(workspace: torch.Tensor, group: str) -> Any:
    """The symmetric memory behind a workspace; the first call for it is collective."""
    return symmetric_memory.rendezvous(workspace, group)  # type: ignore[arg-type]


def others(handle: Any) -> Iterator[int]:
    """The other members, each rank beginning with its next one, so that nobody gets, or gives, everything at once."""
    return ((handle.rank + step) % handle.world_size for step in range(1, handle.world_size))


def raise_flag(handle: Any, member: int, number: int, source: int, stream: torch.cuda.Stream) -> None:
    """Let `wait_signal(source, number)` on a member pass, by copying a word: a kernel might find no free processor."""
    word = handle.signal_pad_ptrs[member] + 4 * (handle.world_size * number + source)
    copy_bytes(word, handle.buffer_ptrs[handle.rank], 4, stream)


def copy_bytes(target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Start to copy memory between addresses of this GPU or of peers."""
    _copy(target, size, source, size, size, 1, stream)


def _rows(plan: Sequence[int]) -> Iterator[Sequence[int]]:
    return (plan[start : start + FIELDS] for start in range(0, len(plan), FIELDS))


def _copy(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: torch.cuda.Stream
) -> None:
    cuda = _runtime()
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    (status,) = cuda.cudaMemcpy2DAsync(
        target, target_pitch, source, source_pitch, width, height, kind, stream.cuda_stream
    )
    if status != cuda.cudaError_t.cudaSuccess:
        raise RuntimeError(f"cudaMemcpy2DAsync of {height} rows of {width} bytes: {status}")


@functools.cache
def _runtime() -> Any:
    """CUDA's, which is not there where there are no GPUs."""
    from cuda.bindings import runtime

    return runtime


@functools.cache
def wires(device: torch.device, members: int, what: str = "exchanges") -> tuple[torch.cuda.Stream, ...]:
    """One stream per member for each thing that travels, so that copies to several run side by side, and none waits for
    what it does not need."""
    return tuple(torch.cuda.Stream(device) for _ in range(members))  # type: ignore[no-untyped-call]

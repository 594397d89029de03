"""One rank of several on one GPU, without the others: what it sends comes back to it at once.

Results are wrong. What a rank computes, copies and starts is what it does among others, so its time is that of a rank
which waits for nobody, over links that take none of it: no less is possible on as many GPUs. Copies to others stay on
this GPU, where its processors make them, which copy engines do between two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from staged import finished

NAME = "loopback"


def start(ranks: int) -> torch.device:
    """Make a default process group of so many ranks, of which this process is the first, and there are no others."""
    from xdit_ir.transport import distributed, peer_ops

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    os.environ[distributed.SHARED] = "1"
    dist.Backend.register_backend(NAME, Loopback, devices=["cpu", "cuda"])
    dist.init_process_group(NAME, rank=0, world_size=ranks, store=dist.HashStore())
    # Nobody else is on the line; a graph may hold what is done here without the host.
    distributed.line_of = lambda *_: None  # type: ignore[assignment]
    distributed.Communicator.of_all = lambda self, mine: [mine] * self.mesh.world_size  # type: ignore[method-assign]
    distributed.Communicator.recordable = property(lambda _: True)  # type: ignore[assignment]
    handles: dict[int, Alone] = {}

    def symmetric(workspace: torch.Tensor, group: str) -> Alone:
        return handles.setdefault(workspace.data_ptr(), Alone(workspace, ranks))

    peer_ops.symmetric = symmetric
    return device


class Alone:
    """Symmetric memory whose every member is this one, and whose flags are raised already."""

    def __init__(self, workspace: torch.Tensor, ranks: int) -> None:
        from xdit_ir.transport.workspace import PADS, SIGNALS

        self.rank, self.world_size, self._workspace = 0, ranks, workspace
        with torch.inference_mode(False):  # which may be written to anywhere
            self._pad = torch.ones(PADS * SIGNALS, dtype=torch.int32, device=workspace.device)
        self.buffer_ptrs = [workspace.data_ptr()] * ranks
        self.signal_pad_ptrs = [self._pad.data_ptr()] * ranks

    def wait_signal(self, member: int, number: int, patience: int) -> None:
        """A kernel, as there."""
        self._pad[-1:].fill_(1)

    def barrier(self, number: int, patience: int) -> None:
        """All are here."""

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
        """A part of the workspace, `offset` elements behind its start: as there, no view that PyTorch knows of."""
        start, size = offset * dtype.itemsize, torch.Size(shape).numel() * dtype.itemsize
        address, device = self._workspace.data_ptr() + start, self._workspace.device
        storage = torch._C._construct_storage_from_data_pointer(address, device, size)
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, strides)

    def get_signal_pad(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The flags."""
        return self._pad.view(dtype).view(shape)


class Loopback(dist.ProcessGroup):
    """Collectives that give this rank what it gave, as often as there are members."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)

    def _get_backend(self, device: torch.device) -> None:
        """There is none behind it that has options."""

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        """Its name in torch.distributed."""
        name: str = dist.distributed_c10d._world.pg_names[self]
        return name

    def alltoall_base(self, out: torch.Tensor, x: torch.Tensor, *_: Any) -> Any:
        there, here = out.view(-1), x.reshape(-1)
        size = min(there.numel(), here.numel())
        there[:size].copy_(here[:size])
        return finished([out])

    all_to_all_single = alltoall_base

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        return finished(tensors)

    broadcast = allreduce

    def allgather(self, outs: Sequence[Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor], *_: Any) -> Any:
        for out, x in ((out, x) for each, x in zip(outs, tensors, strict=True) for out in each):
            out.copy_(x)
        return finished(outs[0])

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, *_: Any) -> Any:
        out.view(self.size(), -1).copy_(x.reshape(1, -1).expand(self.size(), -1))
        return finished([out])

    def barrier(self, opts: Any = None) -> Any:
        return finished([])

    def abort(self) -> None:
        """Nothing waits."""

    def shutdown(self) -> None:
        """Nothing is held."""

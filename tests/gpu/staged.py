"""A backend for ranks that share a GPU, where NCCL refuses to work: tensors go through host memory, by gloo.

Nothing of it can be recorded in a CUDA graph; copy engines are not concerned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future, _register_process_group
from torch.futures import Future

NAME = "staged"


def start() -> torch.device:
    """Make the default process group, by torchrun's environment, and this rank's GPU the current one.

    By NCCL where each rank has a GPU of its own, else by this backend.
    """
    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    if int(os.environ["WORLD_SIZE"]) <= gpus:
        dist.init_process_group("nccl", device_id=device)
        return device
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.Backend.register_backend(NAME, Staged, devices=["cpu", "cuda"])
    dist.init_process_group(NAME)
    from xdit_ir.transport import peer_ops  # needs CUDA

    rendezvous = peer_ops.symmetric
    peer_ops.symmetric = lambda workspace, group: rendezvous(workspace, f"symmetric {group}")
    return device


class Staged(dist.ProcessGroup):
    """Collectives over tensors of any device, each finished when the call returns."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._store, self._beside = store, None
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    def _get_backend(self, device: torch.device) -> Any:
        return self._gloo

    @property
    def group_name(self) -> str:
        """Its name in torch.distributed; groups written in Python have no store, by which symmetric memory meets, so
        there is another one for that."""
        name: str = dist.distributed_c10d._world.pg_names[self]
        if self._beside is None:
            self._beside = dist.ProcessGroup(dist.PrefixStore("symmetric", self._store), self.rank(), self.size())
            _register_process_group(f"symmetric {name}", self._beside)
        return name

    def getBackendName(self) -> str:
        return NAME

    def alltoall_base(self, out: torch.Tensor, x: torch.Tensor, outs: Any, ins: Any, *_: Any) -> Any:
        return self._run([out], [x], lambda o, i: self._gloo.alltoall_base(o[0], i[0], outs, ins))

    all_to_all_single = alltoall_base

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:
        return self._run(tensors, tensors, lambda o, _: self._gloo.allreduce(o, opts or dist.AllreduceOptions()))

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:
        return self._run(tensors, tensors, lambda o, _: self._gloo.broadcast(o, opts))

    def allgather(self, outs: Sequence[Sequence[torch.Tensor]], tensors: Sequence[torch.Tensor], *_: Any) -> Any:
        return self._run(outs[0], tensors, lambda o, i: self._gloo.allgather([o], i))

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, *_: Any) -> Any:
        return self._run([out], [x], lambda o, i: self._gloo._allgather_base(o[0], i[0]))

    def barrier(self, opts: Any = None) -> Any:
        return self._run([], [], lambda *_: self._gloo.barrier())

    def abort(self) -> None:
        self._gloo.abort()

    def shutdown(self) -> None:
        self._gloo.shutdown()

    def _run(self, outs: Sequence[torch.Tensor], ins: Sequence[torch.Tensor], call: Callable[[Any, Any], Any]) -> Any:
        here = [x.cpu() for x in ins]
        there = here if outs is ins else [torch.empty_like(x, device="cpu") for x in outs]
        call(there, here).wait()
        for out, x in zip(outs, there, strict=True):
            out.copy_(x)
        return finished(outs)


def finished(outs: Sequence[torch.Tensor]) -> Any:
    """What a collective that is over returns."""
    done: Future[Any] = Future()
    done.set_result(list(outs))
    return _create_work_from_future(done)

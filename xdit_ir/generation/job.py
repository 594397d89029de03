"""The processes of a generation: the device of each, and which of them together run one copy of the pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.transport.distributed import BACKENDS, check_processes
from xdit_ir.transport.groups import DEFAULT_TIMEOUT


@dataclass(frozen=True)
class Job:
    """This process: `rank` of the `processes` of its group; the `groups` of a job generate for different prompts."""

    device: torch.device
    rank: int = 0
    processes: int = 1
    group: int = 0
    groups: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process of its group that writes files."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """Whether this is the process of the job that prints."""
        return self.rank == 0 and self.group == 0


def start(mesh: Mesh | None, groups: int = 1, device: str | None = None, timeout: timedelta | None = None) -> Job:
    """Check the degrees, choose LOCAL_RANK's device and, for several processes, initialise torch.distributed.

    Each group becomes a world of its own, so that nothing else has to know of the others. Nothing is loaded yet, so
    what is wrong is said within seconds, and on every process.

    Args:
        mesh: the mesh of one group; None to take what is there (a pipeline that is ported already).
        timeout: of the process group.

    Raises:
        ParallelizeError: the job has another number of processes, or a process has no GPU of its own.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() and groups > 1:
        raise ParallelizeError(f"data={groups} needs to initialise torch.distributed, which has been done already")
    if mesh is not None:
        check_size(mesh, world, groups)
    chosen = choose_device(device)
    if dist.is_initialized() or world == 1:
        return Job(chosen, dist.get_rank() if dist.is_initialized() else 0, world)
    return _initialise(chosen, world, groups, timeout or DEFAULT_TIMEOUT)


def check_size(mesh: Mesh, world: int, groups: int = 1) -> None:
    """Raise `ParallelizeError` unless `groups` of `mesh` are as many processes as there are; names what is legal."""
    if world % groups:
        legal = max(size for size in range(1, groups + 1) if world % size == 0)
        raise ParallelizeError(
            f"data={groups} divides the processes into groups of equal size, and this job has {world}; "
            f"nearest legal: data={legal}"
        )
    try:
        check_processes(mesh, world // groups)
    except ParallelizeError as error:
        each = f"in each of data={groups} groups: " if groups > 1 else ""
        command = f" (torchrun --nproc-per-node {groups * mesh.world_size} ...)" if mesh.world_size > 1 else ""
        raise ParallelizeError(f"{each}{error}{command}") from error


def choose_device(name: str | None) -> torch.device:
    """The device of this process, made current: by default LOCAL_RANK's GPU, or the CPU where there are none."""
    count = torch.cuda.device_count()
    kind = name or ("cuda" if count else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise ParallelizeError(f"device={kind!r}: expected 'cuda' or 'cpu'; LOCAL_RANK picks the GPU")
    if count == 0:
        raise ParallelizeError(
            f"rank {os.environ.get('RANK', '0')} sees no GPU; give device='cpu', or look at CUDA_VISIBLE_DEVICES"
        )
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    torch.cuda.set_device(chosen)
    return chosen


def _initialise(device: torch.device, world: int, groups: int, timeout: timedelta) -> Job:
    store, rank, _ = next(iter(rendezvous("env://")))
    if device.type == "cuda":
        _compare_gpus(store, rank, world, str(torch.cuda.get_device_properties(device).uuid))
    size = world // groups
    group, within = divmod(rank, size)
    if size > 1:
        own = PrefixStore(f"data{group}", store)
        dist.init_process_group(BACKENDS[device.type], store=own, rank=within, world_size=size, timeout=timeout)
    return Job(device, within, size, group, groups)


def _compare_gpus(store: Any, rank: int, world: int, gpu: str) -> None:
    store.set(f"gpu{rank}", gpu)
    check_distinct([store.get(f"gpu{other}").decode() for other in range(world)])


def check_distinct(gpus: Sequence[str]) -> None:
    """Raise `ParallelizeError` if two ranks have one GPU: they would wait for each other for ever."""
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        other = first.setdefault(gpu, rank)
        if other != rank:
            raise ParallelizeError(
                f"rank {rank} has no GPU of its own: it shares {gpu} with rank {other}; {len(gpus)} ranks need as many "
                f"GPUs, and have {len(set(gpus))}: start fewer processes per node"
            )

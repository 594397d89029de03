"""The processes of a generation: the device of each, and which replica of the pipeline it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.transport.distributed import BACKENDS, check_processes, replica_of_process
from xdit_ir.transport.groups import DEFAULT_TIMEOUT
from xdit_ir.transport.replicas import Replica
from xdit_ir.transport.spread import exchanged, told

LOG = logging.getLogger("xdit_ir")


@dataclass(frozen=True)
class Job:
    """This process; the replicas of a job generate for different prompts. `hosts`: of all processes, if they meet."""

    device: torch.device
    replica: Replica = field(default_factory=Replica)
    hosts: tuple[str, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether this is the process of its replica that writes files."""
        return self.replica.rank == 0

    @property
    def reports(self) -> bool:
        """Whether this is the process of the job that prints."""
        return self.leads and self.replica.index == 0


def start(
    mesh: Mesh,
    data: int = 1,
    device: str | None = None,
    timeout: timedelta | None = None,
    *,
    planned: bool = False,
) -> Job:
    """Check the degrees, choose LOCAL_RANK's device and, for several processes, initialise torch.distributed.

    Nothing is loaded yet, so what is wrong is said within seconds, and on every process.

    Args:
        mesh: of one replica.
        data: the number of replicas.
        timeout: of the process group.
        planned: only the size of the mesh is known yet.

    Raises:
        ParallelizeError: the job has another number of processes, or a process has no GPU of its own.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    try:
        check_processes(mesh, world, data)
    except ParallelizeError as error:
        wanted = mesh.world_size * data
        command = f" (torchrun --nproc-per-node {wanted} ...)" if wanted > 1 else ""
        raise ParallelizeError(f"{error}{command}") from error
    chosen = choose_device(device)
    if not dist.is_initialized() and world > 1:
        _initialise(chosen, world, timeout or DEFAULT_TIMEOUT, alone=mesh.world_size == 1)
    hosts: tuple[str, ...] = ()
    if dist.is_initialized():
        hosts = exchanged(dist.distributed_c10d._get_default_store(), dist.get_rank(), world)
    job = Job(chosen, replica_of_process(mesh, data), hosts)
    if job.reports and not planned and (text := told(mesh, hosts)):
        LOG.info(text)
    return job


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


def _initialise(device: torch.device, world: int, timeout: timedelta, *, alone: bool) -> None:
    store, rank, _ = next(iter(rendezvous("env://")))
    if device.type == "cuda":
        _compare_gpus(store, rank, world, str(torch.cuda.get_device_properties(device).uuid))
    if not alone:
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=world, timeout=timeout)


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

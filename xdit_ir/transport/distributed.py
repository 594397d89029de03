"""The processes behind a mesh: torch.distributed's default group, one process group for all ranks that talk."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.errors import LostError, ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.transport import spread
from xdit_ir.transport.groups import DEFAULT_TIMEOUT, Groups, Leaving, configured_timeout, losing
from xdit_ir.transport.line import AnyError, Line, line_of
from xdit_ir.transport.release import Release
from xdit_ir.transport.replicas import Replica

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
SHARED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""Tells PyTorch that ranks on one GPU may have symmetric memory."""
Members = tuple[int, ...]
"""Ranks that talk, in rank order."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ensure_process_group(device: torch.device, mesh: Mesh, timeout: timedelta | None = None, data: int = 1) -> Replica:
    """Make sure that the job has one process per rank of each of `data` replicas of `mesh`, and return this process's.

    Uses the default process group, or initialises it from torchrun's environment (NCCL for `device` cuda, whose
    current device then becomes LOCAL_RANK's; gloo on the CPU). A mesh of one rank needs no process group.

    Raises:
        ParallelizeError: the job has another number of processes, was not started by torchrun, or its process
            group cannot move tensors of `device`. Every rank of a job sees the same, so all of them raise.
    """
    if mesh.world_size == 1:
        check_world_size(mesh, data)
        return replica_of_process(mesh, data)
    if not dist.is_available():
        raise ParallelizeError(f"{_degrees(mesh)} needs torch.distributed, which this build of torch lacks")
    if dist.is_initialized():
        check_processes(mesh, dist.get_world_size(), data)
        _check_backend(device)
    else:
        _initialise(device, mesh, timeout, data)
    return replica_of_process(mesh, data)


def replica_of_process(mesh: Mesh, data: int) -> Replica:
    """The one that this process of the job is in; a single mesh of one rank may be run by every process."""
    if mesh.world_size == data == 1:
        return Replica()
    started = dist.is_available() and dist.is_initialized()
    return Replica.of(dist.get_rank() if started else int(os.environ.get("RANK", "0")), mesh.world_size, data)


def check_world_size(mesh: Mesh, data: int = 1) -> None:
    """Raise `ParallelizeError` if the running job is known to have another number of processes than the meshes."""
    known = _processes()
    if data > 1 or (mesh.world_size > 1 and known is not None):
        check_processes(mesh, known or 1, data)


def processes_of_job() -> int:
    """Those of the default process group, or that torchrun has started; 1 without either."""
    return _processes() or 1


def _processes() -> int | None:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TORCHRUN) else None


def processes_of_replica(data: int) -> int:
    """Those of each of `data` replicas; raises `ParallelizeError` if the job cannot be divided into so many."""
    processes = processes_of_job()
    if processes % data:
        legal = max(count for count in range(1, data) if processes % count == 0)
        raise ParallelizeError(
            f"data={data} divides the processes into replicas of equal size, and this job has {processes}; nearest "
            f"legal: data={legal}, or start {-(-processes // data) * data} processes"
        )
    return processes // data


def _initialise(device: torch.device, mesh: Mesh, timeout: timedelta | None, data: int) -> None:
    missing = [name for name in _TORCHRUN if name not in os.environ]
    count = mesh.world_size * data
    if missing:
        raise ParallelizeError(
            f"{_degrees(mesh)} needs {count} processes, but torch.distributed is not initialised and "
            f"{', '.join(missing)} not set; start with `torchrun --nproc-per-node {count} ...`"
        )
    check_processes(mesh, int(os.environ["WORLD_SIZE"]), data)
    if device.type == "cuda":
        _select_gpu(device)
    dist.init_process_group(BACKENDS.get(device.type), timeout=timeout or DEFAULT_TIMEOUT)


def _select_gpu(device: torch.device) -> None:
    """Make LOCAL_RANK's GPU current; two ranks on one GPU would wait for each other for ever."""
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])) % torch.cuda.device_count()
    if device.index not in (None, local):
        raise ParallelizeError(
            f"the model of local rank {local} is on {device}; move it to cuda:{local} "
            "(torch.cuda.set_device(LOCAL_RANK) before anything is moved to cuda)"
        )
    torch.cuda.set_device(local)


def check_processes(mesh: Mesh, processes: int, data: int = 1) -> None:
    """Raise `ParallelizeError`, which names the nearest legal choices, unless so many fit `data` replicas of a mesh."""
    wanted = mesh.world_size * data
    if processes == wanted:
        return
    needs = f"{wanted} processes" if wanted > 1 else "1 process"
    replicas = f" x data={data}" if data > 1 else ""
    nearest = [] if data > 1 else [_nearest(mesh, processes)]
    if processes % mesh.world_size == 0:
        more = processes // mesh.world_size
        nearest.append(f"data={more}" + " (as many replicas, each with requests of its own)" * (data == 1))
    raise ParallelizeError(
        f"{_degrees(mesh)}{replicas} needs {needs}, this job has {processes}; nearest legal: "
        f"{', or '.join(nearest or [_nearest(mesh, processes)])}, or start {needs}"
    )


def _backend(device: torch.device) -> str | None:
    """What moves tensors of a device; backends are listed like `cpu:gloo,cuda:nccl`."""
    backends = dict(item.split(":") for item in dist.get_backend_config().split(","))
    return backends.get(device.type)


def _check_backend(device: torch.device) -> None:
    unfit = {"cuda": "gloo"}.get(device.type)  # gloo lists cuda, but its threads wait for the device as they like
    if _backend(device) in (None, unfit):
        raise ParallelizeError(
            f"the default process group ({dist.get_backend_config()}) cannot exchange tensors on {device.type}; "
            f"initialise it with backend {BACKENDS.get(device.type)!r}, or leave that to xdit_ir"
        )


def _degrees(mesh: Mesh) -> str:
    named = [f"{name}={size}" for name, size in mesh.degrees.items() if size > 1]
    return " x ".join(reversed(named)) or "ulysses=1"


def _nearest(mesh: Mesh, processes: int) -> str:
    """Degrees for this many processes: change one degree if that is enough."""
    for name in reversed(mesh.names):
        size = mesh.degrees[name]
        others = mesh.world_size // size
        if size > 1 and processes % others == 0:
            return _degrees(mesh.resized(name, processes // others))
    return f"ulysses={processes}"


class Communicator:
    """This process's rank in a mesh and its process groups, each made once and by all processes together.

    `line` connects the hosts of all ranks (None for one rank, or without `handshake`). After a failure, and when it is
    given back, a communicator is `ended`: whoever has it makes another one. Of `data` replicas of the mesh it is that
    of this process, whose ranks are counted from 0.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        *,
        handshake: bool = True,
        timeout: timedelta | None = None,
        data: int = 1,
    ) -> None:
        self.mesh, self.device = mesh, device
        self.replica = ensure_process_group(device, mesh, timeout, data)
        self.rank = self.replica.rank
        alone = mesh.world_size == 1
        self.timeout = timeout or (DEFAULT_TIMEOUT if alone else configured_timeout(device))
        self.line: Line | None = None
        self._world = None if alone or dist.group.WORLD is None else weakref.ref(dist.group.WORLD)
        if handshake and dist.group.WORLD is not None and not alone:
            self.line = line_of(dist.group.WORLD, self.replica, self.timeout)
        self.epoch = 0 if self.line is None else self.line.epoch
        self._groups = Groups(device, self.timeout, self.replica, self.epoch)
        self.release = Release()
        self._made: set[tuple[tuple[Members, ...], bool]] = set()
        self._by_members: dict[tuple[Members, bool], dist.ProcessGroup] = {}
        weakref.finalize(self, self._groups.drop).atexit = False
        if self.line is not None:
            self.line.watch(self)

    @property
    def ended(self) -> bool:
        """Whether it is of no use any more."""
        if self._world is not None and self._world() is not dist.group.WORLD:
            return True  # the caller has destroyed all groups
        return self._groups.ended or (self.line is not None and self.line.epoch != self.epoch)

    @property
    def recordable(self) -> bool:
        """Whether CUDA graphs can hold collectives: those of NCCL, not those for which a backend needs the host."""
        return self.mesh.world_size == 1 or _backend(self.device) == BACKENDS["cuda"]

    def lost(self) -> LostError | None:
        """What has ended it, if a rank failed in an earlier call."""
        if self.line is not None:
            return self.line.past(self.epoch)
        return LostError("a rank failed in an earlier call", self.rank) if self._groups.ended else None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around all that other ranks take part in: one thread at a time, and if anything is raised inside, the others
        do not wait for it.

        Raises:
            LostError: another rank failed.
        """
        if self.mesh.world_size == 1:
            yield
        elif self.line is not None:
            with self.line.working():
                yield
        else:
            try:
                with losing():
                    yield
            except BaseException:
                self.abort()
                raise

    def agreed(self, error: AnyError) -> AnyError:
        """The error, marked as one that every rank raises now, so that nobody has to be told."""
        return error if self.line is None else self.line.agreed(error)

    def abort(self) -> None:
        """End all waiting, from any thread."""
        self._groups.abort()
        self.release()

    def close(self) -> None:
        """Give back all groups."""
        self._made.clear()
        self._by_members.clear()
        self._groups.close()

    def flush(self, leaving: Leaving) -> None:
        """Before groups are given back, wait for what is on its way there."""
        self._groups.leaving.append(leaving)

    def new_group(self, members: Sequence[int]) -> dist.ProcessGroup:
        """A group of these ranks that lives as long as this. Collective: all ranks of the mesh call it."""
        return self._groups.make(members)

    def prepare(self, wanted: Iterable[tuple[str, ...]], *, mesh: Mesh | None = None, beside: bool = False) -> None:
        """Make the groups over these sets of mesh dims, those of a program's own `mesh` of the same ranks if that is
        another one; `beside` as for `group`. Collective: all ranks name the same sets."""
        mesh = mesh or self.mesh
        for dims in sorted(set(wanted), key=lambda dims: (len(dims), dims)):
            groups = tuple(sorted({mesh.group(rank, dims) for rank in range(mesh.world_size)}))
            self._prepare(groups, beside=beside)

    def process(self, rank: int) -> int:
        """The number of a rank's process in the job."""
        return self.replica.processes[rank]

    def group(self, dims: tuple[str, ...], *, beside: bool = False) -> dist.ProcessGroup:
        """The ranks that differ from this one at most in `dims`, in rank order; `prepare` made it. What goes on
        `beside` other exchanges has another group of the same ranks."""
        return self.among(self.mesh.group(self.rank, dims), beside=beside)

    def among(self, members: Members, *, beside: bool = False) -> dist.ProcessGroup:
        """That of these ranks, which this one is among."""
        return self._by_members[members, beside]

    def of_all(self, mine: Any) -> list[Any]:
        """What every rank gives, in rank order: lists, texts and numbers. Collective."""
        if self.line is not None:
            return self.line.exchange(("facts", self.line.count()), mine, self.timeout)
        found: list[Any] = [mine] * self.mesh.world_size
        if len(found) > 1:
            self.prepare([self.mesh.names])
            dist.all_gather_object(found, mine, group=self.group(self.mesh.names))
        return found

    def in_common(self, names: Sequence[str]) -> list[str]:
        """The names that every rank gives, in the order of the first rank. Collective."""
        first, *others = self.of_all(list(names))
        return [name for name in first if all(name in other for other in others)]

    def _prepare(self, groups: tuple[Members, ...], *, beside: bool) -> None:
        if len(groups[0]) == 1 or (groups, beside) in self._made:
            return
        self._made.add((groups, beside))
        for members in groups:
            made = self.new_group(members)
            if self.rank in members:
                self._by_members[members, beside] = made


def peers_reachable(communicator: Communicator) -> bool:
    """Whether all ranks are on GPUs of one host that can read and write each other's memory. Collective.

    Ranks that share a GPU do where PyTorch's symmetric memory takes them, see `SHARED`.
    """
    if communicator.device.type != "cuda" or communicator.mesh.world_size == 1:
        return False
    here = communicator.device.index
    others = [index for index in range(torch.cuda.device_count()) if index != here]
    reaches = all(torch.cuda.can_device_access_peer(here, other) for other in others)
    able = reaches and importlib.util.find_spec("cuda.bindings") is not None
    facts = communicator.of_all([able, spread.host(), here])
    hosts, gpus = {host for _, host, _ in facts}, {gpu for _, _, gpu in facts}
    apart = len(gpus) == len(facts) or os.environ.get(SHARED) == "1"
    return all(fact[0] for fact in facts) and len(hosts) == 1 and apart

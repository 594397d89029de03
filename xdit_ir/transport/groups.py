"""Process groups that can be ended from outside: nobody waits in one for a rank that has failed."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xdit_ir.errors import LostError, ParallelizeError
from xdit_ir.transport.replicas import Replica

DEFAULT_TIMEOUT = timedelta(minutes=10)
FLUSH = timedelta(seconds=10)
Leaving = deque[tuple[torch.Tensor, Any]]
"""Messages that are being sent."""
_UNUSED_TAG = 2**30
_LOSSES = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|closed by peer|broken pipe|timed? ?out|pair closure|"
    r"process group|socket|symmetric memory",
    re.IGNORECASE,
)


class Groups:
    """The process groups that a module has made, in an `epoch` of the line; making one is collective for all ranks of
    a replica."""

    def __init__(self, device: torch.device, timeout: timedelta, replica: Replica, epoch: int) -> None:
        self.device, self.timeout, self.ended = device, timeout, False
        self.replica, self.epoch = replica, epoch
        self.leaving: list[Leaving] = []
        self._made: list[Any] = []

    def make(self, members: Sequence[int]) -> dist.ProcessGroup:
        """A group of these ranks, on all ranks of the replica; no process group on those that are no members."""
        processes = [self.replica.processes[member] for member in sorted(members)]
        with losing():
            group: dist.ProcessGroup = (
                dist.new_group(processes, timeout=self.timeout)
                if self.replica.count == 1
                else group_of_members(processes, self.epoch, self.timeout)
            )
        self._made.append(group)
        return group

    def abort(self) -> None:
        """End all waiting here and at the other members, from any thread."""
        self.ended = True
        for group in self._made:
            if isinstance(group, dist.ProcessGroup):
                with contextlib.suppress(Exception):
                    _abort(group, self.device)

    def drop(self) -> None:
        """Give them back when nobody has them any more, on each rank at a time of its own: NCCL may wait for others."""
        if self.device.type == "cuda":
            threading.Thread(target=self.close, name="xdit_ir groups", daemon=True).start()
        else:
            self.close()

    def close(self) -> None:
        """Give them back. Nothing of them is used any more, but what was sent may be on its way."""
        for _, work in (entry for leaving in self.leaving for entry in leaving if not self.ended):
            with contextlib.suppress(RuntimeError):
                work.wait(FLUSH)
        self.leaving.clear()
        self.ended = True
        while self._made:
            group = self._made.pop()
            if isinstance(group, dist.ProcessGroup):
                with contextlib.suppress(Exception):  # the caller may have destroyed all groups before
                    dist.destroy_process_group(group)


def group_of_members(processes: Sequence[int], epoch: int, timeout: timedelta) -> Any:
    """Like `dist.new_group`, which all processes of a job call together, or which names a group by what each of its
    members has made before: here only members take part, and what is told by the store names it.

    Raises:
        ParallelizeError: the default group makes others by dividing itself, which takes all processes.
    """
    from torch.distributed import distributed_c10d as c10d

    default = dist.group.WORLD
    assert default is not None
    if default.bound_device_id is not None:
        raise ParallelizeError(
            f"replicas (data=) make process groups of their own, but the default one is bound to "
            f"{default.bound_device_id} and makes groups by all processes together; leave device_id= out of "
            "init_process_group, or leave that to xdit_ir"
        )
    if dist.get_rank() not in processes:
        return dist.GroupMember.NON_GROUP_MEMBER
    backend, store = c10d._world.pg_map[default]
    name: Any = f"xdit_ir/{epoch}/{'_'.join(map(str, processes))}"
    name += f"/{store.add(f'{name}/{dist.get_rank()}', 1)}"
    rank = processes.index(dist.get_rank())
    group, _ = c10d._new_process_group_helper(len(processes), rank, processes, backend, store, name, timeout=timeout)
    c10d._world.pg_group_ranks[group] = {process: place for place, process in enumerate(processes)}
    return group


def _abort(group: dist.ProcessGroup, device: torch.device) -> None:
    """NCCL has a call for that. Gloo ends all that waits in a group, at all of its members, when one operation there
    has waited longer than it may."""
    if device.type == "cuda":
        group.abort()
        return
    backend = group._get_backend(device)
    for tag in range(len(getattr(backend.options, "_devices", [None]))):  # each has operations of its own
        with contextlib.suppress(RuntimeError):
            pending: Any = group.recv([torch.empty(1)], (group.rank() + 1) % group.size(), _UNUSED_TAG + tag)
            pending.wait(timedelta(milliseconds=1))


def is_loss(error: BaseException) -> bool:
    """Whether an error says that an exchange with another rank was not finished."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, LostError)
    return isinstance(error, dist.DistError) or bool(_LOSSES.search(str(error)))


@contextlib.contextmanager
def losing() -> Iterator[None]:
    """What a backend raises inside means that another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise LostError(f"an exchange with another rank was not finished: {str(error).splitlines()[0]}") from error


def configured_timeout(device: torch.device) -> timedelta:
    """That with which the caller made the default process group, where it is shorter than ours; groups do not inherit
    it."""
    default = dist.group.WORLD
    assert default is not None
    options = getattr(default._get_backend(device), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return DEFAULT_TIMEOUT if timeout is None else min(timeout, DEFAULT_TIMEOUT)

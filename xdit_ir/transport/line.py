"""The line: what the processes of a job tell each other beside the tensors, and who of them has failed.

Every process has one, whatever number of modules it runs, so that calls of different modules are compared too. Calls
are counted within an *epoch*. It ends on every rank when some rank fails inside a call: that one says so and goes on to
the next epoch, each other one raises `LostError` once and follows, and all groups of processes are made anew. So after
a failure, however it came, all ranks count alike again. Nothing here ever waits for a device.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from xdit_ir.errors import LostError, MismatchError
from xdit_ir.transport.groups import is_loss
from xdit_ir.transport.patrol import Failure, Patrol
from xdit_ir.transport.replicas import Replica
from xdit_ir.transport.sockets import connect_all

HINDSIGHT = 2.0  # seconds after a connection broke in which it shows who broke it
Topic = tuple[str, int]
# What ranks do one after the other, each under a number of its own: of one number all do the same.
COUNTED = {"call": "runs a forward", "facts": "plans, or asks what others run on", "contents": "compares weights"}
AnyError = TypeVar("AnyError", bound=BaseException)


class Abortable(Protocol):
    """What may make a call wait for another rank; made in an `epoch` of the line."""

    epoch: int

    def abort(self) -> None:
        """End all waiting, from any thread; it is of no use afterwards."""
        ...


class Line:
    """This process's end. `working` is around all that other ranks take part in."""

    def __init__(self, store: Any, rank: int, world: int, timeout: timedelta) -> None:
        self.rank, self.world, self.epoch, self.depth = rank, world, 0, 0
        self.calls = 0
        self._turn, self._news = threading.RLock(), threading.Condition()
        self._heard: dict[tuple[int, Topic], dict[int, Any]] = {}
        self._failures: dict[int, Failure] = {}
        self._past: list[Failure] = []
        self._late: list[tuple[int, Callable[[], object]]] = []
        self._agreed: BaseException | None = None
        self._watched: weakref.WeakSet[Abortable] = weakref.WeakSet()
        self._patrol = Patrol(connect_all(store, rank, world, timeout), weakref.proxy(self), timeout)

    def watch(self, one: Abortable) -> None:
        """Abort it when a rank fails."""
        self._watched.add(one)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around a call, or a wait for something that other ranks make: one thread at a time; whatever is raised
        inside, unless it was `agreed`, all other ranks hear of, and raise `LostError`."""
        with self._turn:
            self.depth += 1
            try:
                if self.depth == 1:
                    self._agreed = None
                    self._raise_failure()
                yield
                if self.depth == 1:
                    self._raise_failure()
            except BaseException as error:
                if self.depth > 1 or error is self._agreed:
                    raise
                named = self._named(error)
                self._leave(error if named is None else named)
                if named is None or named is error:
                    raise
                raise named from error
            finally:
                self.depth -= 1

    def agreed(self, error: AnyError) -> AnyError:
        """The error, marked as one that every rank raises now."""
        self._agreed = error
        return error

    def past(self, epoch: int) -> LostError | None:
        """What ended an epoch, if it is over."""
        return self._past[epoch].error() if epoch < self.epoch else None

    def count(self) -> int:
        """The number of a further call."""
        self.calls += 1
        return self.calls

    def say(self, topic: Topic, content: Any) -> None:
        """Tell it to all ranks, and wait for nobody."""
        with self._news:
            self._heard.setdefault((self.epoch, topic), {})[self.rank] = content
        self._patrol.send({"epoch": self.epoch, "topic": topic, "content": content})

    def ask(self, topic: Topic, timeout: timedelta) -> list[Any]:
        """What the ranks say, in their order; all of them say something sooner or later.

        Raises:
            LostError: one of them fails, or says nothing in time.
            MismatchError: one of them does something else instead.
        """
        key, deadline = (self.epoch, topic), time.monotonic() + timeout.total_seconds()
        with self._news:
            while len(self._heard.get(key, ())) < self.world:
                self._raise_unlike(topic)
                self._raise_failure()
                left = deadline - time.monotonic()
                if left <= 0:
                    self._raise_silent(key, timeout)
                self._news.wait(min(left, 1.0))
            said = self._heard.pop(key)
        return [said[rank] for rank in range(self.world)]

    def has(self, topic: Topic) -> bool:
        """Whether all ranks have said it."""
        with self._news:
            return len(self._heard.get((self.epoch, topic), ())) == self.world

    def exchange(self, topic: Topic, content: Any, timeout: timedelta) -> list[Any]:
        """Say something and hear the others."""
        self.say(topic, content)
        return self.ask(topic, timeout)

    def put_off(self, due: int, compare: Callable[[], object]) -> None:
        """Compare something when call number `due` is made."""
        self._late.append((due, compare))

    def settle(self) -> None:
        """Compare what was put off until the next call."""
        ready = [compare for due, compare in self._late if due <= self.calls + 1]
        self._late = [one for one in self._late if one[0] > self.calls + 1]
        for compare in ready:
            compare()

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        """A message of another rank has come."""
        epoch = message["epoch"]
        if "failed" in message:
            self._fail(epoch, Failure(message["failed"], message["why"]))
            return
        with self._news:
            if epoch >= self.epoch:
                kind, number = message["topic"]
                self._heard.setdefault((epoch, (kind, number)), {})[rank] = message["content"]
                self._news.notify_all()

    def lost(self, failure: Failure) -> None:
        """A rank is gone, or seems to be."""
        self._fail(self.epoch, failure)

    def close(self) -> None:
        """End it, in good order."""
        self._patrol.close()

    def _fail(self, epoch: int, failure: Failure) -> None:
        with self._news:
            if epoch < self.epoch or epoch in self._failures:
                return
            self._failures[epoch] = failure
            self._news.notify_all()
        self._abort(epoch)

    def _abort(self, epoch: int) -> None:
        """Whatever was made until then."""
        for one in list(self._watched):
            if one.epoch <= epoch:
                one.abort()

    def _raise_failure(self) -> None:
        failure = self._failures.get(self.epoch)
        if failure is not None:
            raise failure.error()

    def _raise_unlike(self, topic: Topic) -> None:
        mine, number = topic
        for kind in (COUNTED.keys() - {mine}) if mine in COUNTED else ():
            for rank in self._heard.get((self.epoch, (kind, number)), ()):
                raise MismatchError(
                    f"the ranks' calls differ: rank {self.rank} (this one) {COUNTED[mine]}, rank {rank} "
                    f"{COUNTED[kind]}; every rank must give port the same degrees and options"
                )

    def _raise_silent(self, key: tuple[int, Topic], timeout: timedelta) -> None:
        rank = min(set(range(self.world)) - set(self._heard.get(key, ())))
        raise LostError(f"rank {rank} is alive, but did not make call {key[1][1]} within {timeout}", rank)

    def _named(self, error: BaseException) -> LostError | None:
        """Where an error comes of another rank's failure: one that says which."""
        if isinstance(error, LostError) and error.rank is not None:
            return error
        lost = is_loss(error)
        if lost:
            with self._news:
                self._news.wait_for(lambda: self.epoch in self._failures, HINDSIGHT)
        failure = self._failures.get(self.epoch)
        if failure is None and lost:
            failure = self._patrol.suspect()
        if failure is None:
            return LostError(_short(error)) if lost else None
        if not lost and not isinstance(error, RuntimeError):
            return None
        return LostError(f"rank {failure.rank} {failure.why} ({_short(error)})", failure.rank)

    def _leave(self, error: BaseException) -> None:
        """Tell all others that this call has failed, and go on to the next epoch."""
        failure = self._failures.get(self.epoch)
        if failure is None:
            failure = Failure(self.rank, f"left call {self.calls}: {type(error).__name__}: {_short(error)}")
            if isinstance(error, LostError) and error.rank is not None:
                failure = Failure(error.rank, str(error).removeprefix(f"rank {error.rank} "))
        self._patrol.send({"epoch": self.epoch, "failed": failure.rank, "why": failure.why})
        with self._news:
            ended, self.epoch = self.epoch, self.epoch + 1
            self._past.append(failure)
            self.calls, self._late = 0, []
            self._failures.pop(ended, None)
            self._heard = {key: said for key, said in self._heard.items() if key[0] > ended}
        self._abort(ended)


def _short(error: BaseException) -> str:
    """What it says first."""
    lines = str(error).splitlines() or [""]
    return lines[0][:300]


# The one place where modules of a process meet: torch has one default group per process, and that has one line, or one
# for each way to divide its processes into replicas.
_LINES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Replica, Line]] = weakref.WeakKeyDictionary()


def line_of(group: dist.ProcessGroup, replica: Replica, timeout: timedelta) -> Line:
    """The line of a replica in a default process group, made at its first use, by all its ranks together.

    Raises:
        MismatchError: another process has other replicas.
    """
    lines = _LINES.setdefault(group, {})
    if replica not in lines:
        store = dist.distributed_c10d._get_default_store()
        _agree_count(store, len(lines), replica)
        if replica.count > 1:
            store = dist.distributed_c10d.PrefixStore(f"replica {replica.index} of {replica.count}", store)
        made = lines[replica] = Line(store, replica.rank, replica.size, timeout)
        atexit.register(_close, weakref.ref(made))
    return lines[replica]


def _agree_count(store: Any, turn: int, replica: Replica) -> None:
    """Who divides the processes in another way would wait for those that never come."""
    mine = str(replica.count)
    first = store.compare_set(f"xdit_ir/replicas/{turn}", "", mine).decode()
    if first != mine:
        raise MismatchError(
            f"the processes differ in data=: rank {dist.get_rank()} (this one) has data={mine}, another one data="
            f"{first}; every process of the job needs the same degrees"
        )


def _close(ref: weakref.ref[Line]) -> None:
    line = ref()
    if line is not None:
        line.close()

"""What becomes of requests that wait: taken in turn, cancelled, too late, too many."""

from __future__ import annotations

import time

import pytest

from xdit_ir.generation.request import Request
from xdit_ir.serving.work import BUSY, CANCELLED, DONE, LATE, Made, Queue, Work, WorkError


def put(queue: Queue, patience: float = 60.0) -> Work:
    return queue.put(Request(("a cat",)), 1, patience)


def outcome(work: Work) -> str:
    error = work.future.exception(timeout=0)
    return error.outcome if isinstance(error, WorkError) else DONE


def test_in_turn() -> None:
    queue = Queue(4)
    first, second = put(queue), put(queue)
    assert [first.state, len(queue)] == ["queued", 2]
    assert queue.take(0) is first and first.state == "running"
    first.finish([Made("image/png", b"")])
    assert queue.take(0) is second and queue.take(0) is None
    assert first.state == DONE and queue.outcomes == {DONE: 1}


def test_what_nobody_wants_is_not_taken() -> None:
    queue = Queue(4)
    cancelled, late, good = put(queue), put(queue, patience=0.01), put(queue)
    cancelled.cancel()
    time.sleep(0.02)
    assert queue.take(0) is good
    assert [outcome(cancelled), outcome(late)] == [CANCELLED, LATE]
    assert "request 2: timed out after 0.01 s" in str(late.future.exception())


def test_what_waits_ends_without_anybody_who_takes_it() -> None:
    """While ranks are started anew."""
    queue = Queue(4)
    late = put(queue, patience=0.0)
    time.sleep(0.01)
    queue.sweep()
    assert outcome(late) == LATE and len(queue) == 0


def test_no_room_and_the_end() -> None:
    queue = Queue(1)
    waiting = put(queue)
    with pytest.raises(WorkError, match="1 requests are waiting") as refused:
        put(queue)
    assert refused.value.outcome == BUSY
    queue.close(WorkError(BUSY, "the server is stopping"))
    assert outcome(waiting) == BUSY
    with pytest.raises(WorkError, match="stopping"):
        put(queue)

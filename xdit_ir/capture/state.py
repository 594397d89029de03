"""What forward writes into Python objects outside of its arguments: found, and put back or refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import is_
from typing import Any

import numpy as np
from torch import nn

from xdit_ir.capture.identity import NAMED
from xdit_ir.errors import StateError
from xdit_ir.reflection.atoms import alike, same_entries
from xdit_ir.reflection.fingerprint import traced
from xdit_ir.reflection.parts import MISSING, Part
from xdit_ir.reflection.reach import Reach

_ADVICE = (
    "a parallel program repeats what was traced and would lose it; steps that reuse blocks of earlier ones are an "
    "option of port, as in cache='first-block:0.08'; pass any other state to forward as an argument, or take the "
    "cache, counter or hook out of the model before it is ported"
)


@dataclass(frozen=True, eq=False)
class StateWrite:
    """What forward left in one of the caller's objects: its entries before and after."""

    part: Part
    before: Mapping[Any, Any]
    after: Mapping[Any, Any]
    exchanged: bool = False  # it refers to modules of the model, of which the copies were there

    @property
    def names(self) -> list[str]:
        """The entries that differ."""
        return [self.part.name(key) for key in changed(self.before, self.after)]


class StateWatch:
    """The Python state that a model's forward can reach, as it is now; `outside` are tensors there, by id."""

    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        reach = Reach(roots)
        self._reach = reach  # so that ids stay those of what was found
        self._first = [(part, dict(part.read())) for part in reach.parts]
        self._before, self._exchanged = self._first, set[Part]()
        self._missed = [(item, item.cache_info().misses) for item in reach.caches]
        self._random = random.getstate(), np.random.get_state()
        self.outside = {id(tensor): label for label, tensor in reach.tensors}

    def exchange(self, copies: Callable[[Part, Mapping[Any, Any]], dict[Any, Any] | None]) -> None:
        """Let parts hold what `copies` says, until `restore`."""
        made = [(part, copies(part, held)) for part, held in self._first if held]
        for part, held in made:
            if held is not None:
                part.put(held)
                self._exchanged.add(part)
        if self._exchanged:  # copies are marked too
            self._before = [(part, dict(part.read())) for part, _ in self._first]

    def changes(self) -> Iterator[StateWrite]:
        """What is not as it was."""
        for part, before in self._before:
            held = part.read()
            if not held and not before:  # most containers of modules
                continue
            if _is_untouched(held, before) or _is_watched(held, before):
                continue
            now = {key: item for key, item in held.items() if traced(item) is item and key != NAMED}
            before = {key: item for key, item in before.items() if key in now or key not in ("forward", NAMED)}
            if not same_entries(now, before):
                yield StateWrite(part, before, now, exchanged=part in self._exchanged)

    def restore(self, copies: Mapping[int, Any] | None = None) -> None:
        """Put everything back but in `copies`, which are thrown away; an `lru_cache` that was missed is emptied."""
        for cached, misses in self._missed:
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        for part, before in self._first:
            ours = copies is not None and id(part.item) in copies
            if not ours and not same_entries(part.read(), before):
                part.put(before)

    def check_draws(self) -> None:
        """Raise `TraceError` if Python's or NumPy's random numbers were drawn, after putting their states back."""
        python, numpy = self._random
        drawn = random.getstate() != python or str(np.random.get_state()) != str(numpy)
        random.setstate(python)
        np.random.set_state(numpy)
        if drawn:
            raise StateError(
                "forward draws random numbers of Python or NumPy, of which a program would repeat the first for ever; "
                "use torch.rand and the like"
            )


def _is_untouched(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Whether these are the very same entries."""
    return len(now) == len(before) and all(map(is_, (*now, *now.values()), (*before, *before.values())))


def _is_watched(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Whether these are the very same entries, and behind them the tracer's own wrappers only."""
    if len(now) <= len(before) or "forward" in before or NAMED in before:
        return False
    if not all(map(is_, (*before, *before.values()), (*islice(now, len(before)), *islice(now.values(), len(before))))):
        return False
    return all(traced(item) is not item for item in islice(now.values(), len(before), None))


@contextmanager
def unchanged(module: nn.Module) -> Iterator[StateWatch]:
    """Python state of a module that is run for a trial, put back afterwards."""
    watch = StateWatch([("", module)])
    try:
        yield watch
    finally:
        watch.restore()


def changed(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> list[Any]:
    """The keys of entries that differ."""
    keys = dict.fromkeys((*after, *before))
    return [key for key in keys if not alike(after.get(key, MISSING), before.get(key, MISSING))] or list(keys)[:1]


def refusal(writes: Iterable[StateWrite], why: str = ", again at every call") -> StateError:
    """That forward keeps a state."""
    names = list(dict.fromkeys(name for write in writes for name in write.names))
    shown = ", ".join(repr(name) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return StateError(f"forward keeps a state between calls, writing {shown}{why}; {_ADVICE}")


@contextmanager
def left(writes: Iterable[StateWrite]) -> Iterator[Callable[[], None]]:
    """Writes done to the caller's objects while in the context; for good, if what it gives is called."""
    done: list[StateWrite] = []
    keep = False

    def kept() -> None:
        nonlocal keep
        keep = True

    try:
        for write in writes:
            done.append(write)
            write.part.put(write.after)
        yield kept
    finally:
        for write in reversed(done) if not keep else ():
            write.part.put(write.before)

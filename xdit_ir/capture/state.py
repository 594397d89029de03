"""What forward writes into Python objects outside of its arguments: found, put back, and kept if it is a table."""

from __future__ import annotations

import random
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from xdit_ir.capture.atoms import ATOMS, alike, same_entries
from xdit_ir.capture.fakes import device_of, is_fake
from xdit_ir.capture.fingerprint import traced
from xdit_ir.capture.identity import NAMED
from xdit_ir.capture.parts import MISSING, Context, Part, Position, TensorContents
from xdit_ir.capture.predicates import computed
from xdit_ir.capture.reach import Reach
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.skeleton import Skeleton, is_plain_object
from xdit_ir.capture.values import FromBuffer, Origin, expand, ordinary
from xdit_ir.errors import StateError, TraceError

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
        made = [(part, copies(part, held)) for part, held in self._first]
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
            if _is_untouched(held, before):
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


@dataclass(frozen=True, eq=False)
class Writes:
    """What forward leaves: `kept` are writes to the caller's objects of real tensors.

    `refused` is an error, if something depends on what forward was given, or cannot be followed. Where that is made of
    weights alone, `without` are writes that take it away: what is made anew before it is read is not missed then.
    """

    kept: list[StateWrite]
    refused: TraceError | None = None
    without: tuple[StateWrite, ...] = ()


def writes_of(found: Sequence[StateWrite], skeleton: Skeleton, recorder: Recorder) -> Writes:
    """What forward left in copies and in the caller's objects."""
    originals = skeleton.originals
    refused = [write for write in found if write.exchanged or isinstance(write.part, (Position, Context))]
    if refused:
        return Writes([], refusal(refused))
    real = _Real(recorder, originals)
    made: list[StateWrite] = []
    anew: list[StateWrite] = []
    problems: list[TraceError] = []
    for write in found:
        part = write.part.of(originals.get(id(write.part.item), write.part.item))
        own = part is not write.part and part.item is write.part.item
        before = write.before if own else dict(part.read())
        try:
            made.append(StateWrite(part, before, dict(real.entries(write, before))))
        except _Unreal as problem:
            problems.append(refusal([write], f", which {problem}"))
            if not isinstance(problem, _OfWeights):
                return Writes([], problems[-1])
            gone = set(changed(write.before, write.after))
            anew.append(StateWrite(part, before, {key: item for key, item in before.items() if key not in gone}))
    for owner, tensor in recorder.filled.items():
        part, known = TensorContents(tensor, owner), recorder.tables[owner][0].known
        assert known is not None
        made.append(StateWrite(part, part.read(), {"contents": ordinary(known)}))
    kept = [write for write in made if not same_contents(write.after, write.before)]
    return Writes(kept, problems[0], tuple(anew)) if problems else Writes(kept)


def same_contents(now: Any, before: Any) -> bool:
    """Whether entries were written anew, but are as they were: a table that is made again at every call."""
    if alike(now, before):
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, torch.Tensor):
        same = now.shape == before.shape and now.dtype == before.dtype and now.device == before.device
        return same and not now.is_meta and torch.equal(now, before)
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(same_contents, now, before))
    if isinstance(now, dict):
        return list(now) == list(before) and all(map(same_contents, now.values(), before.values()))
    plain = is_plain_object(type(now)) and hasattr(now, "__dict__") and not isinstance(now, nn.Module)
    return plain and same_contents(vars(now), vars(before))


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


class _Unreal(Exception):
    """What a value of the trace is, that it cannot be left in the caller's objects."""


class _OfWeights(_Unreal):
    """It is computed from weights alone, as are those that hooks make of others before a layer runs."""


class _Unmade(Exception):
    """A table that depends on nothing, but cannot be computed here: it is left out, and made again when missed."""


class _Real:
    """Values of the trace as they are outside: originals for copies, and contents for fake tensors."""

    def __init__(self, recorder: Recorder, originals: Mapping[int, Any]) -> None:
        self._recorder, self._originals = recorder, originals
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []

    def entries(self, write: StateWrite, originally: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
        """What is written, and the caller's own of what is not."""
        for key, item in write.after.items():
            if key is FakeTensor:  # a registry of types, to which that of the trace was added
                continue
            if self._is_copy(key):
                raise _Unreal("is of a module of the model, by its identity")
            if key in originally and alike(item, write.before.get(key, MISSING)):
                yield key, originally[key]
                continue
            try:
                yield key, self(item)
            except _Unmade:
                if key in originally:
                    yield key, originally[key]

    def _is_copy(self, item: Any) -> bool:
        """Whether it is a copy, its number, or a weak reference to it."""
        item = item() if isinstance(item, weakref.ReferenceType) else item
        return (item if type(item) is int else id(item)) in self._originals

    def __call__(self, item: Any) -> Any:
        if isinstance(item, (int, weakref.ReferenceType)) and self._is_copy(item):
            raise _Unreal("is the identity of a module of the model")
        if isinstance(item, (*ATOMS, type)):
            return item
        if id(item) in self._originals:
            return self._originals[id(item)]
        if id(item) not in self._made:
            self._kept.append(item)
            self._made[id(item)] = item  # for what refers to itself
            self._made[id(item)] = self._convert(item)
        return self._made[id(item)]

    def _convert(self, item: Any) -> Any:
        if is_fake(item):
            return self._contents(item)
        if isinstance(item, (nn.Parameter, nn.Module)):
            raise _Unreal(f"is a new {type(item).__name__}")
        if isinstance(item, types.MethodType):
            return types.MethodType(item.__func__, self(item.__self__))
        if type(item) in (list, set, frozenset, tuple):
            return type(item)(map(self, item))
        if isinstance(item, dict):
            for key, entry in list(item.items()):
                dict.__setitem__(item, key, self(entry))
        elif is_plain_object(type(item)) and hasattr(item, "__dict__"):
            vars(item).update({key: self(entry) for key, entry in vars(item).items()})
        elif any(is_fake(entry) for _, entry in Reach([("", item)]).tensors):
            raise _Unreal(f"is a {type(item).__qualname__} with tensors inside")
        return item

    def _contents(self, fake: torch.Tensor) -> torch.Tensor:
        value = self._recorder.found(fake)
        if value is None:
            raise _Unreal("is a tensor that the trace did not see")
        found = expand(value.roots)
        roots = [root for root in found if root is not Origin.CONSTANT and not isinstance(root, FromBuffer)]
        origins = sorted(str(getattr(root, "value", f"input {root!r}")) for root in roots)
        if origins:
            kind = _OfWeights if set(roots) == {Origin.PARAMETER} else _Unreal
            raise kind(f"is computed from {', '.join(origins)}")
        known = value.known if value.known is not None else computed(self._recorder, value)
        if known is None:
            raise _Unmade
        return ordinary(known).to(device_of(fake))

"""What the option `cache` says: when a region of blocks is computed, and when its last change is reused."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from xdit_ir.caching.kept import Latest, PastValue
from xdit_ir.errors import ParallelizeError

FORMS = ("first-block:0.08", "timestep:0.1", "every:2", "steps:0,1,2,5")
EXPECTED = f"expected one of the forms {', '.join(map(repr, FORMS))}"


class Watched(Enum):
    """What tells whether a region is computed; the texts are those of passes' options."""

    FIRST_BLOCK = "first-block"  # the change of what the first block adds, since the region was computed last
    TIMESTEP = "timestep"  # the changes of the timestep's features, summed since then
    NOTHING = "nothing"  # the number of the step


@dataclass(frozen=True)
class Group:
    """Values that the same steps reuse, and what is kept of each of them."""

    reused: Callable[[int], bool]
    history: Callable[[], PastValue] = Latest


@dataclass(frozen=True)
class CacheRule:
    """`text` is what was given. A region is reused up to the relative change `threshold`; where nothing is watched, in
    the steps that are neither in `computed` nor a multiple of `every`; behind `period` steps they count anew.

    With `groups` there is no region: values are marked in the program, each with its place among them. `branchless`:
    all calls of a step count, each as a step of its own, whichever branch of guidance it is for."""

    text: str
    watched: Watched
    threshold: float = 0.0
    every: int = 0
    computed: frozenset[int] = frozenset()
    period: int = 0
    groups: tuple[Group, ...] = ()
    branchless: bool = False

    @staticmethod
    def parse(text: object) -> CacheRule:
        """Raises `ParallelizeError` for what is no rule."""
        if isinstance(text, CacheRule):
            return text
        if not isinstance(text, str):
            raise ParallelizeError(f"cache={text!r:.60}: {EXPECTED}")
        kind, _, value = text.partition(":")
        kinds = [form.partition(":")[0] for form in FORMS]
        if kind not in kinds:
            near = difflib.get_close_matches(kind, kinds, n=1)
            raise ParallelizeError(f"cache={text!r}: {EXPECTED}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            return _made(text, kind, value)
        except ValueError:
            raise ParallelizeError(f"cache={text!r}: {value!r} is no legal value of {kind!r}; {EXPECTED}") from None

    @property
    def variants(self) -> tuple[frozenset[int], ...]:
        """The groups that a step may reuse together, none first."""
        together: dict[Callable[[int], bool], set[int]] = {}
        for place, group in enumerate(self.groups):
            together.setdefault(group.reused, set()).add(place)
        sets = list(together.values()) or [{0}]
        chosen = (some for count in range(len(sets) + 1) for some in itertools.combinations(sets, count))
        return tuple(frozenset().union(*some) for some in chosen)

    def reused(self, step: int) -> frozenset[int]:
        """The groups that a step, by its number in its request, reuses where nothing is watched; a region is one."""
        if self.groups:
            return frozenset(place for place, group in enumerate(self.groups) if group.reused(step))
        step = step % self.period if self.period else step
        computes = step in self.computed or bool(self.every and step % self.every == 0)
        return frozenset() if computes else frozenset({0})

    def history(self, group: int) -> PastValue:
        """For a value of a group."""
        return self.groups[group].history() if self.groups else Latest()


def _made(text: str, kind: str, value: str) -> CacheRule:
    if kind == "every":
        _check(int(value) > 0)
        return CacheRule(text, Watched.NOTHING, every=int(value))
    if kind == "steps":
        listed, again, period = value.partition("/")
        steps = frozenset(map(int, listed.split(",")))
        _check(min(steps) >= 0 and (not again or int(period) > 0))
        return CacheRule(text, Watched.NOTHING, computed=steps, period=int(period or 0))
    _check(0 < float(value) < math.inf)
    return CacheRule(text, Watched(kind), threshold=float(value))


def _check(legal: bool) -> None:
    if not legal:
        raise ValueError

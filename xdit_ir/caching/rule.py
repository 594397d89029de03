"""What the option `cache` says: when a region of blocks is computed, and when its last change is reused."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from enum import Enum

from xdit_ir.errors import ParallelizeError

FORMS = ("first-block:0.08", "timestep:0.1", "every:2", "steps:0,1,2,5")
EXPECTED = f"expected one of the forms {', '.join(map(repr, FORMS))}"


class Watched(Enum):
    """What tells whether a region is computed; the texts are those of passes' options."""

    FIRST_BLOCK = "first-block"  # the change of what the first block adds, since the region was computed last
    TIMESTEP = "timestep"  # the changes of the timestep's features, summed since then
    NOTHING = "nothing"  # the number of the step


@dataclass(frozen=True)
class CacheRule:
    """`text` is what was given. A region is reused up to the relative change `threshold`; where nothing is watched, in
    the steps that are neither in `computed` nor a multiple of `every`; behind `period` steps they count anew."""

    text: str
    watched: Watched
    threshold: float = 0.0
    every: int = 0
    computed: frozenset[int] = frozenset()
    period: int = 0

    @staticmethod
    def parse(text: object) -> CacheRule:
        """Raises `ParallelizeError` for what is no rule."""
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

    def computes(self, step: int) -> bool:
        """Whether a step, by its number in its request, computes the region, where nothing is watched."""
        step = step % self.period if self.period else step
        return step in self.computed or bool(self.every and step % self.every == 0)


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

"""What is kept of one value from step to step, and what a step that reuses it gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch


class PastValue(Protocol):
    """A rank's part of one value."""

    def keep(self, x: torch.Tensor, step: int) -> None:
        """A step has computed the value."""

    def reuse(self, step: int) -> torch.Tensor:
        """What a later step takes for it, of the same type."""


@dataclass(eq=False)
class Latest:
    """The value as it was computed last."""

    x: torch.Tensor | None = None

    def keep(self, x: torch.Tensor, step: int) -> None:
        """See `PastValue`."""
        self.x = x

    def reuse(self, step: int) -> torch.Tensor:
        """See `PastValue`."""
        assert self.x is not None, "nothing is reused before it was computed"
        return self.x


class Blank(Latest):
    """Zeros: nobody is meant to look at the value."""

    def keep(self, x: torch.Tensor, step: int) -> None:
        """See `PastValue`."""
        self.x = torch.zeros_like(x)


@dataclass(eq=False)
class Taylor:
    """The Taylor series up to `order` around the step that computed the value last, whose derivatives are divided
    differences of the steps that did (TaylorSeer, arXiv 2503.06923). They are kept in `dtype`; None: that of the value.
    """

    order: int
    dtype: torch.dtype | None = None
    last: int = 0
    factors: list[torch.Tensor] = field(default_factory=list)
    type: torch.dtype = torch.float32

    def keep(self, x: torch.Tensor, step: int) -> None:
        """See `PastValue`."""
        new = [x]
        for before in self.factors[: self.order]:
            new.append((new[-1] - before.to(x.dtype)) / (step - self.last))
        self.factors = [factor.to(self.dtype) for factor in new]
        self.last, self.type = step, x.dtype

    def reuse(self, step: int) -> torch.Tensor:
        """See `PastValue`."""
        found = torch.zeros_like(self.factors[0], dtype=self.type)
        for order, factor in enumerate(self.factors):
            found = found + factor.to(self.type) * ((step - self.last) ** order / math.factorial(order))
        return found


@dataclass(eq=False)
class Trend:
    """The line through the last two values, whether they were computed or reused, `weight` steps on (FasterCache, arXiv
    2410.19355)."""

    weight: Callable[[], float]
    values: list[torch.Tensor] = field(default_factory=list)

    def keep(self, x: torch.Tensor, step: int) -> None:
        """See `PastValue`."""
        self.values = [self.values[-1] if self.values else x, x]

    def reuse(self, step: int) -> torch.Tensor:
        """See `PastValue`."""
        before, last = self.values
        found = last + (last - before) * self.weight()
        self.values = [last, found]
        return found

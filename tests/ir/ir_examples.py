"""Examples of operators: for every operator that has a rule, calls with random shapes and arguments.

A module `ir_examples_*` registers makers with `@example(packet, ...)`: `make(d, packet)` returns a `Sample`, a call
whose tensors become the operands. `d` draws sizes, dims and contents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

aten = torch.ops.aten


@dataclass(frozen=True)
class Sample:
    """One call. `kinds`: which partitions its operands may have; `contents`: whether values are worth comparing."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    contents: bool = True


class Drawer:
    """Draws what examples are made of; tensors are filled from a generator with a drawn seed."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def bool(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def some(self, values: Sequence[Any], least: int = 0) -> list[Any]:
        """A subset, in any order."""
        return self.draw(st.lists(st.sampled_from(list(values)), unique=True, min_size=least)) if values else []

    def shape(self, ndim: int, low: int = 1, high: int = 6) -> tuple[int, ...]:
        return tuple(self.int(low, high) for _ in range(ndim))

    def sized(self) -> tuple[int, ...]:
        """A shape of 1 to 4 dims, with an empty one now and then."""
        return self.shape(self.int(1, 4), low=0 if self.int(0, 7) == 7 else 1)

    def dim(self, ndim: int) -> int:
        """A dim, counted from either end."""
        return self.int(-ndim, ndim - 1)

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that broadcasts to this one."""
        return tuple(self.pick(1, n, n) for n in shape[self.pick(0, 0, self.int(0, len(shape))) :])

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def positive(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.1

    def complex(self, *shape: int) -> torch.Tensor:
        return torch.view_as_complex(self.tensor(*shape, 2))

    def mask(self, *shape: int) -> torch.Tensor:
        return self.tensor(*shape) > 0

    def index(self, high: int, *shape: int) -> torch.Tensor:
        """Indices below `high`."""
        return torch.randint(0, high, shape, generator=self.generator)

    def distinct(self, high: int, count: int) -> torch.Tensor:
        return torch.randperm(high, generator=self.generator)[:count]


Maker = Callable[[Drawer, Any], Sample]
EXAMPLES: dict[Any, list[Maker]] = {}


def example(*packets: Any) -> Callable[[Maker], Maker]:
    """Register a maker of examples for these operators."""

    def register(make: Maker) -> Maker:
        for packet in packets:
            EXAMPLES.setdefault(packet, []).append(make)
        return make

    return register


def named(*names: str) -> list[Any]:
    """ATen operators by name."""
    return [getattr(aten, name) for name in names]

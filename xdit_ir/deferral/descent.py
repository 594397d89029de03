"""From which pending results values were made."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xdit_ir.deferral.samples import Samples


@dataclass(frozen=True, eq=False)
class Numbered:
    """Stands for a result of a maker, one of several `output`s of that number; lives as long as what was made from it,
    whether that is finished or not."""

    number: int
    output: int = 0


@dataclass(frozen=True)
class Descent:
    """From which pending result of one maker a value was made: the newest one; `dims[d]` is the dimension of it whose
    positions dimension `d` follows, if any, and by how much those are further on; `samples`, of which samples it was
    made, where that is known."""

    result: Numbered
    dims: tuple[tuple[int, int] | None, ...]
    samples: Samples | None = None

    @staticmethod
    def of(result: Numbered, dims: int, samples: Samples | None = None) -> Descent:
        """That of the result itself, of so many dimensions."""
        return Descent(result, tuple((dim, 0) for dim in range(dims)), samples)

    @property
    def number(self) -> int:
        """Of the result."""
        return self.result.number


def are_held(results: Iterable[weakref.ref[Numbered]]) -> bool:
    """Whether something that was made from each of these is still held."""
    return all(result() is not None for result in results)


Lineage = Mapping[Any, Descent]
"""By maker of pending results."""

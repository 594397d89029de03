"""What patches leave for each other in time: targets of nodes that write to and read from buffers that persist.

A buffer belongs to one rank and is named by the value that it holds. What each patch contributes to it and takes from
it is static.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from xdit_ir.ir.ops import take
from xdit_ir.ir.partition import Runs

Places = tuple[Runs | None, ...]


@dataclass(frozen=True)
class Slot:
    """Target of a node that uses the buffer `slot` on behalf of `patch`; in a body, `slot` is relative to the call."""

    slot: str
    patch: int

    @property
    def __name__(self) -> str:
        return type(self).__qualname__.lower()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Only a runtime gives it a meaning."""
        raise AssertionError(f"{self.__name__} is executed by a runtime that keeps buffers")


@dataclass(frozen=True)
class Write(Slot):
    """Put a value at `places` (per dim; None: all) of a buffer of this shape; its value is the operand."""

    shape: tuple[int, ...]
    places: Places


@dataclass(frozen=True)
class Read(Slot):
    """The positions `places` of a buffer that the patches `writers` fill; `summed`: of its slots' sum (dim 0)."""

    writers: tuple[int, ...]
    places: Places
    summed: bool = False


@dataclass(frozen=True)
class Keep(Slot):
    """Remember a whole value that is computed once a step, by the first patch; its value is the operand."""


@dataclass(frozen=True)
class Recall(Slot):
    """What the first patch kept."""


def write(buffer: torch.Tensor, value: torch.Tensor, places: Places) -> None:
    """Put `value` at the product of `places`, in place."""
    _write(buffer, value, places, 0)


def _write(buffer: torch.Tensor, value: torch.Tensor, places: Places, dim: int) -> None:
    while dim < len(places) and places[dim] is None:
        dim += 1
    if dim == len(places):
        buffer.copy_(value)
        return
    offset = 0
    for start, length in places[dim] or ():
        _write(buffer.narrow(dim, start, length), value.narrow(dim, offset, length), places, dim + 1)
        offset += length


def read(buffer: torch.Tensor, target: Read) -> torch.Tensor:
    """What `target` wants of the buffer: a copy, which later writes leave alone."""
    result = read_places(buffer, target.places, summed=target.summed)
    return result if target.summed else result.clone()


def read_places(buffer: torch.Tensor, places: Places, *, summed: bool) -> torch.Tensor:
    """The positions `places` of a buffer (`summed`: of its slots' sum); may be a view of it."""
    result = buffer.sum(0) if summed else buffer
    for dim, runs in enumerate(places):
        if runs is not None:
            result = take(result, dim, runs)
    return result

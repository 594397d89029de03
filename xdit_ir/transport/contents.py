"""What tensors hold, in a few numbers that differ if they do; computed where they are, without waiting for devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WAVES = 3
SMALL = 16  # elements, for which rounding is no excuse
LARGE = 2**23  # elements that are read at a time, in a few times as much memory
FEW = 1e-6  # of these
TINY = 1e-10  # integers, and what is computed of them in double precision


@dataclass(frozen=True)
class Seen:
    """What was computed of a tensor, as it was then."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    numbers: torch.Tensor

    def holds(self, x: torch.Tensor) -> bool:
        """Whether it is that tensor, which nobody has written to."""
        return self.tensor() is x and not x.is_inference() and x._version == self.version


@dataclass(frozen=True)
class _Rows:
    """What was computed on one device, on its way to the host: for which of all tensors, and the event behind it."""

    places: Sequence[int]
    table: torch.Tensor
    event: Any = None

    @staticmethod
    def of(rows: Sequence[torch.Tensor], device: torch.device) -> _Rows:
        """Those of `rows` that are there; a model's tables may be on the host while its weights are not."""
        places = [place for place, row in enumerate(rows) if row.device == device]
        there = torch.stack([rows[place] for place in places])
        if not there.is_cuda:
            return _Rows(places, there)
        with torch.cuda.device(device):
            table = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            table.copy_(there, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _Rows(places, table, event)

    def here(self) -> _Rows:
        """The same, once they are on the host."""
        if self.event is not None:
            self.event.synchronize()
        return dataclasses.replace(self, event=None)


class Contents:
    """Those of named tensors, on their way to the host, and numbers that are there: `numbers` waits for what was
    computed before, if it must.

    `seen` has what was computed for earlier ones, and gets what is computed now; not so for those that are `again`
    looked at. `rounding`: by so much of their norm large floats of `given` may differ where ranks computed them.
    """

    def __init__(
        self,
        given: Mapping[str, torch.Tensor | Sequence[float]],
        seen: dict[str, Seen] | None = None,
        again: Mapping[str, torch.Tensor] | None = None,
        rounding: float = 0.0,
    ) -> None:
        again = again or {}
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        self._told = {name: _row(x) for name, x in given.items() if not isinstance(x, torch.Tensor)}
        self.names = [*tensors, *again, *self._told]
        self._tolerances = [_tolerance(x) for x in (*tensors.values(), *again.values())]
        self._tolerances += [_tolerance_of(x) for x in given.values() if not isinstance(x, torch.Tensor)]
        self._rounded = {name: rounding for name, x in tensors.items() if x.is_floating_point() and x.numel() > SMALL}
        with torch.inference_mode(False), torch.no_grad():
            found = [_remembered(name, x, {} if seen is None else seen) for name, x in tensors.items()]
            found += [_projections(x) for x in again.values()]
            self._rows = [_Rows.of(found, device) for device in {row.device: None for row in found}]

    @property
    def ready(self) -> bool:
        """Whether they are here already: those of the host are, and all that were waited for."""
        return all(one.event is None for one in self._rows)

    def numbers(self) -> list[Any]:
        """Names and numbers, to be sent to others."""
        self._rows = [one.here() for one in self._rows]
        rows = dict(pair for one in self._rows for pair in zip(one.places, one.table.tolist(), strict=True))
        return [self.names, [*(rows[place] for place in range(len(rows))), *self._told.values()]]

    def soon(self, seconds: float) -> list[Any] | None:
        """The same, if they are here within this time."""
        deadline = time.monotonic() + seconds
        while not all(one.event is None or one.event.query() for one in self._rows):
            if time.monotonic() > deadline:
                return None
            time.sleep(1e-3)
        return self.numbers()

    def difference(self, everyone: Sequence[Sequence[Any]], *, rounded: bool = False) -> tuple[str, int] | None:
        """The first name under which some rank holds other numbers than the first rank that has it, and that rank;
        `rounded`: numbers that rounding does not explain."""
        tables = [dict(zip(names, rows, strict=True)) for names, rows in everyone]
        for name, exact in zip(self.names, self._tolerances, strict=True):
            tolerance = max(exact, self._rounded.get(name, 0.0)) if rounded else exact
            held = [(rank, table[name]) for rank, table in enumerate(tables) if name in table]
            for rank, row in held[1:]:
                if not _close(row, held[0][1], tolerance):
                    return name, rank
        return None


def _row(numbers: Sequence[float]) -> list[float]:
    """As of a tensor."""
    sums = [sum(x * (place + 1) ** power for place, x in enumerate(numbers)) for power in range(WAVES)]
    return [math.hypot(*numbers), *sums]


def _remembered(name: str, x: torch.Tensor, seen: dict[str, Seen]) -> torch.Tensor:
    before = seen.get(name)
    if before is not None and before.holds(x):
        return before.numbers
    numbers = _projections(x)
    if not x.is_inference():
        seen[name] = Seen(weakref.ref(x), x._version, numbers)
    return numbers


def _close(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    scale = tolerance * max(abs(one[0]), abs(other[0]))
    return all(
        a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= scale for a, b in zip(one, other, strict=True)
    )


def _tolerance(x: torch.Tensor) -> float:
    """Relative to the norm; ranks compute the same, so it is rounding at most, as of other kernels."""
    if not (x.is_floating_point() or x.is_complex()):
        return TINY
    return FEW if x.numel() <= SMALL else 1e-3 if x.dtype.itemsize <= 2 else 1e-5


def _tolerance_of(numbers: Sequence[float]) -> float:
    return TINY if all(float(x).is_integer() for x in numbers) else FEW


def _projections(x: torch.Tensor) -> torch.Tensor:
    """Norm and projections, `[1 + WAVES]` in double precision."""
    real = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    exact = not real.is_floating_point() or real.dtype == torch.float64
    if not real.numel():
        return torch.zeros(1 + WAVES, dtype=torch.float64, device=real.device)
    rows = real.reshape(-1, real.shape[-1] if real.dim() else 1)
    step = max(1, LARGE // max(1, rows.shape[1]))
    if rows.shape[0] > step:
        parts = [_of_rows(rows[first : first + step], first, exact) for first in range(0, rows.shape[0], step)]
        total = torch.stack(parts)
        return torch.cat([total[:, :1].norm(dim=0), total[:, 1:].sum(0)])
    return _of_rows(rows, 0, exact)


def _of_rows(rows: torch.Tensor, first: int, exact: bool) -> torch.Tensor:
    dtype = torch.float64 if exact else torch.float32
    plain = rows.to(dtype)
    if not exact or rows.is_floating_point():  # what is no number is a number of its own, wherever it is
        plain = plain.nan_to_num(1.2345e4, 2.3456e5, -3.4567e5)
    down = _waves(rows.shape[0], first, 0.5, dtype, rows.device)
    across = _waves(rows.shape[1], 0, 0.7, dtype, rows.device)
    waves = ((plain @ across) * down).sum(0)
    return torch.cat([plain.norm()[None], waves]).double()


@functools.lru_cache(maxsize=256)
def _waves(size: int, first: int, start: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[size, WAVES]`: cosines of incommensurable frequencies."""
    places = torch.arange(first, first + size, dtype=torch.float64, device=device)[:, None]
    frequencies = torch.sqrt(torch.arange(1, WAVES + 1, dtype=torch.float64, device=device)) + start
    return torch.cos(places * frequencies + start).to(dtype)

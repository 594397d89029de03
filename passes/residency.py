"""Which weights stay on the GPU while others stream: such that uploads, one after the other, have time to arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Brought:
    """Something stored, of so many bytes on a rank, and the units of work that need it, by their number."""

    size: int
    units: tuple[int, ...]


def staying(stored: Mapping[str, Brought], begins: Sequence[float], end: float, budget: int) -> set[str]:
    """What stays, by name: `budget` bytes at most; nothing if that is not positive.

    What several units need saves an upload for each, so it goes first. Of the rest, what streams is spread evenly over
    the time of a forward: each unit in turn streams if it is due by the seconds of work before it (`begins`; `end` of
    all), and stays else. So what nothing hides, which is the first unit and those that do little work for their bytes,
    stays first; residents and streamed ones alternate; and the bus is never idle for long.
    """
    left, found = max(budget, 0), set[str]()
    for name, one in sorted(stored.items(), key=lambda item: -len(item[1].units)):
        if len(one.units) > 1 and one.size <= left:
            found.add(name)
            left -= one.size
    rest = {name: one for name, one in stored.items() if name not in found}
    total = sum(one.size for one in rest.values())
    rate = max(total - left, 0) / max(end, 1e-12)
    streamed = 0
    for name, one in sorted(rest.items(), key=lambda item: item[1].units[0]):
        due = rate * begins[one.units[0]] - streamed
        if one.size <= left and due < one.size / 2:
            found.add(name)
            left -= one.size
        else:
            streamed += one.size
    for name, one in rest.items():  # rounding may leave room for some more
        if name not in found and one.size <= left:
            found.add(name)
            left -= one.size
    return found

"""Has a dict changed? Told without looking into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    from torch._C._dynamo.guards import dict_version
except ImportError:  # of a torch that does not count: every look finds another one

    def dict_version(held: dict[Any, Any]) -> Any:
        """Never equal to another."""
        return object()


class Versions:
    """Those of some plain dicts: another whenever an entry is set to another object, added or removed. (A subclass,
    such as `OrderedDict`, may change without.)"""

    def __init__(self, held: Sequence[dict[Any, Any]]) -> None:
        self._held = list(held)
        self._now = self._accepted = list(map(dict_version, self._held))

    def changed(self) -> list[int]:
        """The places of dicts that changed since the last `accept`."""
        self._now = now = list(map(dict_version, self._held))
        if now == self._accepted:
            return []
        return [place for place, (one, other) in enumerate(zip(now, self._accepted, strict=True)) if one != other]

    def accept(self) -> None:
        """What `changed` saw is not what was changed."""
        self._accepted = self._now

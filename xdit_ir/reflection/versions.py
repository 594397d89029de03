"""Has a dict changed? Told without looking into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._C._dynamo import guards

_VERSION: Any = getattr(guards, "dict_version", None)  # of a torch without, every dict may have changed


class Versions:
    """Those of some plain dicts: higher than any before whenever an entry is set to another object, added or removed.
    (A subclass, such as `OrderedDict`, may change without.)"""

    def __init__(self, held: Sequence[dict[Any, Any]]) -> None:
        self.held, self._now = list(held), 0
        self._now = self.accepted = self._latest()

    def changed(self) -> list[int]:
        """The places of dicts that changed, or may have, since the last `accept`."""
        self._now = self._latest()
        if self._now <= self.accepted:
            return []
        if not _VERSION:
            return list(range(len(self.held)))
        return [place for place, version in enumerate(map(_VERSION, self.held)) if version > self.accepted]

    def accept(self) -> None:
        """What `changed` saw is not what was changed; `accepted` is another number if it saw anything."""
        self.accepted = self._now

    def _latest(self) -> int:
        return max(map(_VERSION, self.held), default=0) if _VERSION else self._now + 1

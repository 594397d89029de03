"""Has a dict changed? Told without looking into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch._C._dynamo import guards

_VERSION: Any = getattr(guards, "dict_version", None)  # of a torch without, every dict may have changed


class Versions:
    """Those of some plain dicts: another whenever an entry is set to another object, added or removed. (A subclass,
    such as `OrderedDict`, may change without.)"""

    def __init__(self, held: Sequence[dict[Any, Any]]) -> None:
        self._held = list(held)
        self._now = self._accepted = self._read()

    def changed(self) -> list[int]:
        """The places of dicts that changed, or may have, since the last `accept`."""
        self._now = now = self._read()
        if not now:
            return list(range(len(self._held)))
        if now == self._accepted:
            return []
        return [place for place, (one, other) in enumerate(zip(now, self._accepted, strict=True)) if one != other]

    def accept(self) -> None:
        """What `changed` saw is not what was changed."""
        self._accepted = self._now

    def _read(self) -> list[int]:
        return list(map(_VERSION, self._held)) if _VERSION else []

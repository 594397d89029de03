"""The short form of parallel degrees: `u2`, `r3`, `c2u2r2`, `p2m4` (four patches), and comma-separated lists."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from xdit_ir.errors import ParallelizeError

LETTERS = {"c": "cfg", "p": "pipefusion", "r": "ring", "u": "ulysses"}
PATCHES = "m"
ITEM = re.compile(r"(?:[cprum][1-9]\d*)+")


@dataclass(frozen=True)
class Degrees:
    """One set of degrees; `str()` is its short form, in rank order. `patches`: None for as many as stages."""

    cfg: int = 1
    pipefusion: int = 1
    ring: int = 1
    ulysses: int = 1
    patches: int | None = None

    def __str__(self) -> str:
        named = {letter: getattr(self, name) for letter, name in LETTERS.items()}
        degrees = "".join(f"{letter}{size}" for letter, size in named.items() if size > 1) or "u1"
        return degrees if self.patches is None else f"{degrees}{PATCHES}{self.patches}"

    @property
    def ranks(self) -> int:
        """Their product."""
        return math.prod(getattr(self, name) for name in LETTERS.values())

    def as_dict(self) -> dict[str, Any]:
        """Keyword arguments for `parallelize`, `check` and `port`."""
        degrees = {name: getattr(self, name) for name in LETTERS.values()}
        return degrees if self.patches is None else degrees | {"patches": self.patches}


def parse(text: str) -> list[Degrees]:
    """The sets of degrees in `text`, without repetitions.

    Raises:
        ParallelizeError: the text does not follow the syntax; names the nearest text that does.
    """
    return list(dict.fromkeys(_one(item, text) for item in text.split(",")))


def _one(item: str, text: str) -> Degrees:
    item = item.strip()
    pairs = re.findall(r"([cprum])(\d+)", item)
    letters = [letter for letter, _ in pairs]
    if not ITEM.fullmatch(item) or len(set(letters)) != len(letters):
        raise ParallelizeError(
            f"{item!r} is no set of parallel degrees: write c (cfg), p (pipefusion), r (ring), u (ulysses), "
            f"m (patches), each at most once, with a number; the nearest legal form is {nearest(text)!r}"
        )
    return Degrees(**{LETTERS.get(letter, "patches"): int(number) for letter, number in pairs})


def nearest(text: str) -> str:
    """A legal list of degrees that is close to `text`."""
    items = [_nearest_item(item) for item in text.lower().split(",") if item.strip()]
    return ",".join(dict.fromkeys(items)) or "u2"


def _nearest_item(item: str) -> str:
    found = [(word, number) for word, number in re.findall(r"([a-z]+)[^a-z0-9]*(\d+)", item) if _letter(word)]
    if not found:
        found = [(word, number) for number, word in re.findall(r"(\d+)[^a-z0-9]*([a-z]+)", item) if _letter(word)]
    if not found:
        found = [(word, "2") for word in re.findall(r"[a-z]+", item) if _letter(word)]
    sizes = {LETTERS[_letter(word)]: max(1, int(number)) for word, number in found}
    return str(Degrees(**sizes)) if sizes else "u2"


def _letter(word: str) -> str:
    """The letter of the degree that a word means; empty if none is close."""
    if word in LETTERS:
        return word
    close = difflib.get_close_matches(word, LETTERS.values(), n=1, cutoff=0.5)
    return close[0][0] if close else ""

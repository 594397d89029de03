"""The short form of parallel degrees: `u2`, `r3`, `c2u2r2`, `p2m4` (four patches), and comma-separated lists."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import DIMS, Mesh

LETTERS = {dim.letter: dim.name for dim in DIMS}
PATCHES = "m"
DIGITS = 9  # of the largest number that is read
PAIR = rf"([{''.join(LETTERS)}{PATCHES}])(\d{{1,{DIGITS}}})"


@dataclass(frozen=True)
class Degrees:
    """One set of degrees; `str()` is its short form, in rank order. `patches`: None for as many as stages."""

    mesh: Mesh = field(default_factory=Mesh)
    patches: int | None = None

    @staticmethod
    def of(patches: int | None = None, **degrees: int) -> Degrees:
        """By name of the mesh dims; those that are not named are 1."""
        return Degrees(Mesh.of(**degrees), patches)

    def __str__(self) -> str:
        named = ((letter, self.mesh.degrees[name]) for letter, name in LETTERS.items())
        degrees = "".join(f"{letter}{size}" for letter, size in named if size > 1) or "u1"
        return degrees if self.patches is None else f"{degrees}{PATCHES}{self.patches}"

    @property
    def ranks(self) -> int:
        """Their product."""
        return self.mesh.world_size

    def as_dict(self) -> dict[str, Any]:
        """Keyword arguments for `parallelize`, `check` and `port`."""
        return {**self.mesh.degrees, **({} if self.patches is None else {"patches": self.patches})}


def parse(text: str) -> list[Degrees]:
    """The sets of degrees in `text`, without repetitions.

    Raises:
        ParallelizeError: the text does not follow the syntax; names the nearest text that does.
    """
    return list(dict.fromkeys(_one(item, text) for item in text.split(",")))


def _one(item: str, text: str) -> Degrees:
    item = item.strip()
    sizes = {LETTERS.get(letter, "patches"): int(number) for letter, number in re.findall(PAIR, item)}
    if not re.fullmatch(f"(?:{PAIR})+", item) or len(sizes) < len(re.findall(PAIR, item)) or 0 in sizes.values():
        named = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
        raise ParallelizeError(
            f"{item!r} is no set of parallel degrees: write {named}, {PATCHES} (patches), each at most once, with a "
            f"number; the nearest legal form is {nearest(text)!r}"
        )
    return Degrees.of(**sizes)


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
    sizes = {LETTERS[_letter(word)]: max(1, int(number[:DIGITS])) for word, number in found}
    return str(Degrees.of(**sizes)) if sizes else "u2"


def _letter(word: str) -> str:
    """The letter of the degree that a word means; empty if none is close."""
    if word in LETTERS:
        return word
    close = difflib.get_close_matches(word, LETTERS.values(), n=1, cutoff=0.5)
    return close[0][0] if close else ""

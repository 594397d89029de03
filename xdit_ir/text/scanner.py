"""Reads tokens off a text, and says where it stands when something else was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NoReturn

from xdit_ir.errors import ParseError

BLANK = re.compile(r"[ \t]*")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


class Scanner:
    """A place in one line of a text."""

    def __init__(self, text: str, line: int = 1) -> None:
        self.text, self.line, self.at = text, line, 0
        self._skip()

    def _skip(self) -> None:
        self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return self.at >= len(self.text)

    def match(self, pattern: str) -> str | None:
        """The text that the pattern matches here, passing it and the blanks behind it; else None."""
        found = _compiled(pattern).match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        self._skip()
        return found.group()

    def looking_at(self, pattern: str) -> bool:
        """Whether the pattern matches here."""
        return _compiled(pattern).match(self.text, self.at) is not None

    def expect(self, pattern: str, what: str) -> str:
        """What the pattern matches here; raises `ParseError` saying `what` was expected."""
        found = self.match(pattern)
        return self.fail(what) if found is None else found

    def take(self, literal: str) -> bool:
        """Whether this very text stands here; if so it is passed."""
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        self._skip()
        return True

    def need(self, literal: str) -> None:
        """Pass this very text, which must stand here."""
        if not self.take(literal):
            self.fail(repr(literal))

    def end(self) -> None:
        """Nothing may be left."""
        if not self.done:
            self.fail("the end of the line")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Whatever goes wrong while this line is read is a `ParseError` that names it."""
        try:
            yield
        except ParseError:
            raise
        except Exception as error:
            raise ParseError(f"line {self.line}: {type(error).__name__}: {error}") from error

    def fail(self, expected: str, near: Iterable[str] = ()) -> NoReturn:
        """Raise `ParseError`; `near`: what would be legal here, of which the nearest is named."""
        got = self.text[self.at : self.at + 40] or "the end of the line"
        close = difflib.get_close_matches(got.split("(")[0].split(" ")[0], list(near), n=1)
        hint = f"; nearest: {close[0]}" if close else ""
        raise ParseError(f"line {self.line}, column {self.at + 1}: expected {expected}, got {got!r}{hint}")

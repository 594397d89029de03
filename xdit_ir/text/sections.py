"""A text in its sections: a keyword, the rest of its line, and what stands indented in its braces."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from xdit_ir.errors import ParseError
from xdit_ir.text.scanner import Scanner

KEYWORDS = (
    *("program", "block", "device", "facts", "coordinates", "weights", "stored", "constants", "contents", "tokens"),
    *("seeds", "signature", "partitions"),
)


@dataclass
class TextSection:
    """A keyword, the rest of its line, and the lines in its braces."""

    keyword: str
    head: Scanner
    lines: list[Scanner] = field(default_factory=list)


def sections_of(text: str) -> list[TextSection]:
    """The sections of a text, without comments, which begin with `//`."""
    sections: list[TextSection] = []
    is_open = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("//"):
            continue
        if line == "}":
            is_open = False
        elif line[0] in " \t":
            if not is_open:
                raise ParseError(f"line {number}: stands in no section; sections begin with {', '.join(KEYWORDS)}")
            sections[-1].lines.append(Scanner(line, number))
        else:
            keyword = line.split()[0]
            if keyword not in KEYWORDS:
                near = difflib.get_close_matches(keyword, KEYWORDS, n=1)
                hint = f"; nearest: {near[0]}" if near else ""
                raise ParseError(f"line {number}: {keyword!r} begins no section{hint}")
            is_open = line.rstrip().endswith("{")
            head = Scanner(line.rstrip().removesuffix("{"), number)
            head.need(keyword)
            sections.append(TextSection(keyword, head))
    return sections

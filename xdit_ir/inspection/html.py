"""The page: one file that needs nothing else. Its parts lie in `page/`, as they are; the data goes in as JSON."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from xdit_ir.inspection.json import json_text
from xdit_ir.inspection.model import Inspection

STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
DATA = '<script type="application/json" id="data">{}</script>'
SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)


def html_text(inspection: Inspection) -> str:
    """The whole page."""
    page = files("xdit_ir.inspection") / "page"
    text = _part(page, "index.html")
    text = STYLE.sub(lambda found: f"<style>\n{_part(page, found[1])}</style>", text)
    text = SCRIPT.sub(lambda found: f"<script>\n{_licence(page, found[1])}{_script(page, found[1])}</script>", text)
    data = json_text(inspection).replace("<", "\\u003c")  # nothing in it can end the element
    return text.replace(DATA, DATA.replace("{}", data))


def _part(page: Traversable, name: str) -> str:
    return (page / name).read_text(encoding="utf-8")


def _script(page: Traversable, name: str) -> str:
    return SOURCE_MAP.sub("", _part(page, name))


def _licence(page: Traversable, name: str) -> str:
    """The licence of a library, as a comment in front of it."""
    licence = page / (name.partition(".")[0] + ".LICENSE.txt")
    if not licence.is_file():
        return ""
    text = licence.read_text(encoding="utf-8").partition("/*")[0]
    return f"/*!\n{text.strip()}\n*/\n"

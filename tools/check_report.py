"""What `xdit-ir check` found, for machines: JUnit XML for CI servers, annotations for GitHub."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as xml

from xdit_ir.checking.check import CheckResult
from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.sharding.report import Report


@dataclass(frozen=True)
class Row:
    """What was found for one set of degrees: a result, its cost and what of that is above a limit, or the error that
    refused it."""

    degrees: Degrees
    result: CheckResult | None = None
    report: Report | None = None
    exceeded: tuple[str, ...] = ()
    error: XditError | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`equal`, `DIFFERENT`, `COSTLY`, `refused` (the degrees are illegal for the model) or `ERROR`."""
        if self.result is not None:
            return "DIFFERENT" if not self.result.ok else "COSTLY" if self.exceeded else "equal"
        return "refused" if isinstance(self.error, ParallelizeError) else "ERROR"

    @property
    def explanation(self) -> str:
        """What to know beyond the verdict."""
        if self.result is None:
            return str(self.error)
        return "\n".join([*([] if self.verdict == "COSTLY" else [str(self.result)]), *self.exceeded])


def junit(model: str, rows: Sequence[Row]) -> str:
    """One test case per set of degrees: what differs or is above a limit fails, what was not checked is an error."""
    counts = {kind: sum(row.verdict in verdicts for row in rows) for kind, verdicts in _KINDS.items()}
    totals = {"tests": str(len(rows)), **{f"{kind}s": str(count) for kind, count in counts.items()}}
    totals["time"] = f"{sum(row.seconds for row in rows):.3f}"
    root = xml.Element("testsuites", totals)
    suite = xml.SubElement(root, "testsuite", {"name": f"xdit-ir check {model}", **totals})
    for row in rows:
        name = {"classname": f"xdit-ir.{model}", "name": str(row.degrees), "time": f"{row.seconds:.3f}"}
        case = xml.SubElement(suite, "testcase", name)
        for kind, verdicts in _KINDS.items():
            if row.verdict in verdicts:
                problem = xml.SubElement(case, kind, {"message": row.explanation.splitlines()[0]})
                problem.text = row.explanation
    xml.indent(root)
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


_KINDS = {"failure": ("DIFFERENT", "COSTLY"), "error": ("refused", "ERROR")}


def github_commands(model: str, rows: Sequence[Row]) -> Iterator[str]:
    """A GitHub workflow command for every set of degrees that is not equal, at the model's source line if known."""
    for row in rows:
        if row.verdict == "equal":
            continue
        title = f"xdit-ir check {model} {row.degrees}: {row.verdict}"
        found = None if row.result is None else row.result.first_divergence
        place = None if found is None else found.place
        where = "" if place is None else f"file={_property(source_file(place[0]))},line={place[1]},"
        yield f"::error {where}title={_property(title)}::{_escaped(row.explanation)}"


def source_file(name: str) -> str:
    """The path, from the working directory if it is below, of the one imported source file of this name."""
    files = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    paths = [path for path in map(Path, files) if path.name == name]
    if len(paths) != 1:
        return name
    path = paths[0].resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _escaped(text: str) -> str:
    """As workflow commands want their message."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """As workflow commands want their properties."""
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")

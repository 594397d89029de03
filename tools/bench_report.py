"""Results of `bench` for people: a table on the terminal, a page and a plot, all made from the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdit_ir.errors import XditError

Result = Mapping[str, Any]
BASE = "alone:compiled"
HEADER = (
    "contender",
    "median ms",
    "min to max",
    "speed-up",
    "communication ms",
    "peak GiB",
    "weights",
    "error",
    "first call s",
)
PUBLISHED = ("model", "ranks", "one compiled GPU, ms", "way", "ms", "speed-up")


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Benchmark documents, in the order of their paths; of a file of several all of them."""
    found = [json.loads(path.read_text()) for path in paths]
    return [one for document in found for one in document.get("documents", [document])]


def is_whole(document: Mapping[str, Any]) -> bool:
    """Whether a document is one of `bench`, not medians that another command told."""
    return "torch" in document


def published(documents: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each way to use several GPUs that was timed beside the model alone, cells as in `PUBLISHED`; of some
    only the ratio was told."""
    found = []
    for one in documents:
        base = next((result["median_ms"] for result in one["results"] if result["contender"] == BASE), None)
        where = one["model"], f"{one['ranks']} x {one['gpu']}"
        for result in one["results"]:
            way = result["contender"]
            if result.get("of") == BASE:
                found.append((*where, "", way, "", f"{1 / result['times']:.2f}"))
            elif base and way != BASE and one["ranks"] > 1:
                found.append(
                    (*where, f"{base:.1f}", way, f"{result['median_ms']:.1f}", f"{base / result['median_ms']:.2f}")
                )
    return sorted(found)


def rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per contender, cells as in `HEADER`; the speed-up is over one compiled GPU."""
    done = {result["contender"]: result for result in document["results"]}
    base = done.get(BASE, {}).get("median_ms")
    return [_row(result, base) for result in document["results"]]


def _row(result: Result, base: float | None) -> tuple[str, ...]:
    if "median_ms" not in result:
        return (
            result["contender"],
            f"failed: {' '.join(result.get('failure', 'no result').split())[:120]}",
            *[""] * (len(HEADER) - 2),
        )
    return (
        result["contender"],
        f"{result['median_ms']:.1f}",
        f"{result['min_ms']:.1f} to {result['max_ms']:.1f}",
        f"{base / result['median_ms']:.2f}" if base else "",
        f"{result['communication_ms']:.1f}" if "communication_ms" in result else "",
        f"{result['memory_gib']:.1f}",
        f"{result.get('weights', 1.0):.2f}",
        f"{result['error']:.2e}",
        f"{result['first_call_s']:.0f}",
    )


def title(document: Mapping[str, Any]) -> str:
    """What was measured, where."""
    return f"{document['model']} on {document['ranks']} x {document['gpu']}, torch {document['torch']}"


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in body)]


def page(documents: Sequence[Mapping[str, Any]], head: str) -> str:
    """The Markdown page: `head`, then a table per document, and one of all that is not whole."""
    lines = [head.rstrip(), ""]
    if others := published(one for one in documents if not is_whole(one)):
        lines += ["## Models of published size, the default mode", "", *markdown_table(PUBLISHED, others), ""]
    for document in filter(is_whole, documents):
        lines += [f"## {title(document)}", "", f"`{document.get('command', '')}`", ""]
        lines += [*markdown_table(HEADER, rows(document)), ""]
    return "\n".join(lines)


def plot(documents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the medians with their spread, a panel per document."""
    figure = empty_figure(8, 0.6 + 2.6 * len(documents))
    axes = figure.subplots(len(documents), 1, squeeze=False)
    for axis, document in zip(axes[:, 0], documents, strict=True):
        _bars(axis, document)
    figure.tight_layout()
    figure.savefig(path, format="svg")


def _bars(axis: Any, document: Mapping[str, Any]) -> None:
    results = [result for result in document["results"] if "median_ms" in result]
    names = [result["contender"] for result in results]
    medians = [result["median_ms"] for result in results]
    spread = [
        [result["median_ms"] - result["min_ms"] for result in results],
        [result["max_ms"] - result["median_ms"] for result in results],
    ]
    colours = ["tab:gray" if n.startswith("alone") else "tab:orange" if "-" in n else "tab:blue" for n in names]
    axis.barh(names, medians, xerr=spread, color=colours)
    axis.invert_yaxis()
    axis.set_xlabel("ms per forward")
    axis.set_title(title(document), fontsize=9)


def empty_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches, that is on no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise XditError("a plot needs matplotlib; install xdit-ir[viz]") from None
    return Figure(figsize=(width, height))


def phases(document: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows of a whole pipeline: median seconds of each phase and their range, alone and ported."""
    rows = []
    for phase, alone in document["alone"]["seconds"].items():
        ported = document.get("ported", {}).get("seconds", {}).get(phase)
        gain = "-" if ported is None else f"{alone['median'] / max(ported['median'], 1e-9):.2f}"
        rows.append((phase, _range(alone), "-" if ported is None else _range(ported), gain))
    return rows


def _range(seconds: Mapping[str, float]) -> str:
    return f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})"

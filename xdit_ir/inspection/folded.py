"""The picture with calls in a row as one box: what the static drawings show."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_ir.inspection.model import Box, GraphView


@dataclass(frozen=True)
class Folded:
    """Boxes with the calls that each stands for, and the edges between them, by the box's id."""

    boxes: dict[str, list[Box]]
    edges: dict[tuple[str, str], list[str]]


def folded(view: GraphView) -> Folded:
    """Calls of one run are one box, named after the first."""
    first: dict[int, str] = {}
    home: dict[str, str] = {}
    boxes: dict[str, list[Box]] = {}
    for box in view.boxes:
        home[box.id] = first.setdefault(box.run, box.id) if box.run >= 0 else box.id
        boxes.setdefault(home[box.id], []).append(box)
    edges: dict[tuple[str, str], list[str]] = {}
    for edge in view.edges:
        key = (home[edge.source], home[edge.target])
        if key[0] != key[1]:
            known = edges.setdefault(key, [])
            known += [value for value in edge.values if value not in known]
    return Folded(boxes, edges)


def label(boxes: list[Box]) -> list[str]:
    """The lines of text in a box."""
    one, last = boxes[0], boxes[-1]
    title = one.title if len(boxes) == 1 else f"{one.title} ... {last.title.rpartition('.')[2]}"
    stage = f", stage {one.stage}" if one.stage >= 0 else ""
    if one.kind == "call":
        return [title, one.block + (f" x {len(boxes)}" if len(boxes) > 1 else "") + stage]
    if one.kind == "operators":
        times = f" x {len(boxes)}" if len(boxes) > 1 else ""
        return [title, f"{len(one.lines)} operators{times}{stage}"]
    return [title]

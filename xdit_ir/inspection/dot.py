"""The picture in the language of Graphviz."""

from __future__ import annotations

from xdit_ir.inspection.folded import folded, label
from xdit_ir.inspection.model import Box, Inspection

STAGES = ("#cfdcf8", "#f6d9c8", "#cbe8e2", "#e5d3f2", "#f0e3b8", "#f3cddb", "#d9e8c8", "#d5dde6")


def dot_text(inspection: Inspection) -> str:
    """A digraph of the program, divided if it is; calls in a row are one node."""
    shown = folded(inspection.after or inspection.before)
    lines = [f"digraph {_quoted(inspection.title)} {{", "  rankdir=TB;"]
    lines.append('  node [shape=box, style="rounded,filled", fillcolor="#f4f6f9", fontname="Helvetica", fontsize=11];')
    lines.append('  edge [color="#8a95a3", fontname="Helvetica", fontsize=9];')
    for name, boxes in shown.boxes.items():
        lines.append(f"  {_quoted(name)} [label={_quoted(*label(boxes))}, fillcolor={_quoted(_colour(boxes[0]))}];")
    for (source, target), values in shown.edges.items():
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [tooltip={_quoted(*values)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _colour(box: Box) -> str:
    if box.stage >= 0:
        return STAGES[box.stage % len(STAGES)]
    return "#e3ebfb" if box.kind == "call" else "#f4f6f9"


def _quoted(*lines: str) -> str:
    text = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return f'"{text}"'

"""The picture as SVG, for documents: layers by the longest way from the inputs, ordered so that few edges cross.

The page lays out with a graph library; this is the plain method of Sugiyama et al. (1981): layers, dummies for edges
that pass some, a few sweeps of barycentres.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import networkx

from xdit_ir.inspection.dot import STAGES
from xdit_ir.inspection.folded import Folded, folded, label
from xdit_ir.inspection.model import Inspection

HEIGHT, RANK_GAP, NODE_GAP, MARGIN, CHAR = 44, 40, 26, 20, 6.9
STYLE = """
  text { font: 12px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1b2330; }
  .small { font-size: 10.5px; fill: #5c6878; }
  .box { stroke: #b8c2cf; } .call { stroke: #7f9fe0; }
  .edge { fill: none; stroke: #8a95a3; stroke-width: 1.2; }
  @media (prefers-color-scheme: dark) { .edge { stroke: #74808f; } }
"""


@dataclass
class _Place:
    """A box, or a point that an edge passes, in its layer."""

    name: str
    layer: int
    width: float
    x: float = 0.0
    neighbours: list[str] = field(default_factory=list)


def svg_text(inspection: Inspection) -> str:
    """A drawing of the program, divided if it is; calls in a row are one box."""
    shown = folded(inspection.after or inspection.before)
    places, ways = _layered(shown)
    layers = _ordered(places)
    _set_x(layers)
    right = max(place.x + place.width / 2 for place in places.values()) + MARGIN
    bottom = MARGIN * 2 + len(layers) * (HEIGHT + RANK_GAP) - RANK_GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {bottom:.0f}" width="{right:.0f}" '
        f'height="{bottom:.0f}">',
        f"<style>{STYLE}</style>",
    ]
    parts += [_edge([places[name] for name in way]) for way in ways]
    parts += [_box(shown, places[name]) for name in shown.boxes]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _layered(shown: Folded) -> tuple[dict[str, _Place], list[list[str]]]:
    layer: dict[str, int] = {}
    for name in networkx.topological_sort(networkx.DiGraph(shown.edges.keys())):
        layer[name] = max((layer[source] + 1 for source, target in shown.edges if target == name), default=0)
    layer |= {name: 0 for name in shown.boxes if name not in layer}
    places = {name: _Place(name, layer[name], _width(label(boxes))) for name, boxes in shown.boxes.items()}
    ways = []
    for number, (source, target) in enumerate(shown.edges):
        between = [f"{number} {at}" for at in range(layer[source] + 1, layer[target])]
        places.update({name: _Place(name, layer[source] + 1 + i, 8.0) for i, name in enumerate(between)})
        way = [source, *between, target]
        for one, other in itertools.pairwise(way):
            places[one].neighbours.append(other)
            places[other].neighbours.append(one)
        ways.append(way)
    return places, ways


def _width(texts: Sequence[str]) -> float:
    return max(len(text) for text in texts) * CHAR + 24


def _ordered(places: dict[str, _Place]) -> list[list[_Place]]:
    layers: list[list[_Place]] = [[] for _ in range(1 + max(place.layer for place in places.values()))]
    for place in places.values():
        layers[place.layer].append(place)
    for sweep in range(12):
        at = {place.name: i / max(len(layer), 1) for layer in layers for i, place in enumerate(layer)}
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            aim = {place.name: _centre(place, places, at, above=down) for place in layer}
            layer.sort(key=lambda place: aim[place.name])
            at.update({place.name: i / max(len(layer), 1) for i, place in enumerate(layer)})
    return layers


def _centre(place: _Place, places: dict[str, _Place], at: dict[str, float], *, above: bool) -> float:
    near = [at[name] for name in place.neighbours if (places[name].layer < place.layer) == above]
    return sum(near) / len(near) if near else at[place.name]


def _set_x(layers: list[list[_Place]]) -> None:
    widths = [sum(place.width + NODE_GAP for place in layer) - NODE_GAP for layer in layers]
    for layer, width in zip(layers, widths, strict=True):
        x = MARGIN + (max(widths) - width) / 2
        for place in layer:
            place.x = x + place.width / 2
            x += place.width + NODE_GAP


def _top(place: _Place) -> float:
    return MARGIN + place.layer * (HEIGHT + RANK_GAP)


def _edge(way: list[_Place]) -> str:
    first, last = way[0], way[-1]
    between = [(place.x, _top(place) + HEIGHT / 2) for place in way[1:-1]]
    points = [(first.x, _top(first) + HEIGHT), *between, (last.x, _top(last))]
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        middle = (y + to_y) / 2
        path += f" C{x:.1f},{middle:.1f} {to_x:.1f},{middle:.1f} {to_x:.1f},{to_y:.1f}"
    return f'<path class="edge" d="{path}"/>'


def _box(shown: Folded, place: _Place) -> str:
    boxes = shown.boxes[place.name]
    first, texts = boxes[0], label(boxes)
    x, y = place.x - place.width / 2, _top(place)
    staged = STAGES[first.stage % len(STAGES)]
    fill = staged if first.stage >= 0 else "#e3ebfb" if first.kind == "call" else "#f4f6f9"
    kind = "box call" if first.kind == "call" else "box"
    lines = [
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{place.width:.1f}" height="{HEIGHT}" rx="8" '
        f'fill="{fill}"/>',
        f'<text x="{x + 12:.1f}" y="{y + (19 if len(texts) > 1 else 27):.1f}">{escape(texts[0])}</text>',
    ]
    lines += [f'<text class="small" x="{x + 12:.1f}" y="{y + 35:.1f}">{escape(text)}</text>' for text in texts[1:]]
    return "\n".join(lines)

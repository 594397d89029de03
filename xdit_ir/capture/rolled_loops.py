"""Loops that write one index after the other, such as those that blend tiles row by row, as one write of them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from xdit_ir.capture.operators import aten
from xdit_ir.capture.recorder import Recorder
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import add_node, operands, remove_dead
from xdit_ir.ir.program import CONSTANT, SPEC, WHERE, TensorSpec

WRITE, TAKE = aten.select_scatter.default, aten.select.int
_ROUNDED = (torch.bfloat16, torch.float16)


def roll(graph: fx.Graph, recorder: Recorder) -> None:
    """Rewrite such loops, in place, to what gives the same bits."""
    keeper = recorder if _is_on_one_device(graph, recorder) else None
    found = [node for node in graph.nodes if node.target is WRITE]
    seen = set[fx.Node]()
    for last in reversed(found):
        if last in seen:
            continue
        steps = [last]
        while (before := _before(steps[-1])) is not None:
            steps.append(before)
        seen.update(steps)
        if len(steps) > 1:
            _Loop(graph, steps[::-1], keeper).roll()
    if found:
        remove_dead(graph)


def _is_on_one_device(graph: fx.Graph, recorder: Recorder) -> bool:
    """Whether all values of a graph are where the model is: only there, factors of its own can be."""
    held = (str(node.target).partition(".")[2] for node in graph.nodes if node.op == "get_attr")
    places = [recorder.place(name) for name in held if name in recorder.constants]
    places += [node.kwargs["device"] for node in graph.nodes if node.kwargs.get("device") is not None]
    return all(place == recorder.device for place in places)


def _place(node: fx.Node) -> tuple[int, int]:
    """The dim and the index of a `select` or `select_scatter`."""
    dim, index = node.args[-2:]
    shape = node.args[0].meta[SPEC].shape  # type: ignore[union-attr]
    return int(dim) % len(shape), int(index) % shape[dim]  # type: ignore[arg-type]


def _before(node: fx.Node) -> fx.Node | None:
    """The write of the index before, into which this one goes, if nothing else reads what that left there."""
    base = node.args[0]
    if not isinstance(base, fx.Node) or base.target is not WRITE:
        return None
    (dim, index), (other, previous) = _place(node), _place(base)
    if dim != other or index != previous + 1:
        return None
    reads = (user for user in base.users if user is not node)
    return base if all(user.target is TAKE and _place(user) == (dim, index) for user in reads) else None


class _Loop:
    """The writes of one loop, in order; without a `recorder`, no constants can be had."""

    def __init__(self, graph: fx.Graph, steps: Sequence[fx.Node], recorder: Recorder | None) -> None:
        self.graph, self.steps, self.recorder = graph, steps, recorder
        self.written = frozenset(steps)
        self.dim, self.start = _place(steps[0])
        self.base: Any = steps[0].args[0]
        self.row = steps[0].args[1].meta[SPEC].shape  # type: ignore[union-attr]

    def roll(self) -> None:
        """Write all at once where every step does the same."""
        last = self.steps[-1]
        with self.graph.inserting_before(last):
            rows = self._all([step.args[1] for step in self.steps])
            if rows is None:
                return
            stop = self.start + len(self.steps)
            whole = self._call(aten.slice_scatter.default, last.meta[SPEC], self.base, rows, self.dim, self.start, stop)
        last.replace_all_uses_with(whole)

    def _all(self, one_by_one: Sequence[Any]) -> fx.Node | None:
        """What holds for all steps what these nodes hold for each; None where they differ in more than an index or a
        factor."""
        first = one_by_one[0]
        if not all(isinstance(node, fx.Node) and node.meta[SPEC].shape == self.row for node in one_by_one):
            return None
        if len({(node.target, node.meta[SPEC], str(node.kwargs), len(node.args)) for node in one_by_one}) > 1:
            return None
        if first.target is TAKE:
            return self._slice(one_by_one)
        if not _is_pointwise(first.target):
            return None
        if first.target is aten.mul.Tensor and not isinstance(first.args[1], fx.Node):
            return self._scaled(one_by_one)
        same = [[arg for arg in node.args if not isinstance(arg, fx.Node)] for node in one_by_one]
        if any(operands(fx_node) != [a for a in fx_node.args if isinstance(a, fx.Node)] for fx_node in one_by_one):
            return None  # in lists, or by name
        if any(repr(entry) != repr(same[0]) for entry in same):
            return None
        given: list[Any] = []
        for column in zip(*(node.args for node in one_by_one), strict=True):
            given.append(self._all(column) if isinstance(column[0], fx.Node) else column[0])
        if any(made is None and isinstance(arg, fx.Node) for made, arg in zip(given, first.args, strict=True)):
            return None
        return self._call(first.target, self._spec(first), *given, **first.kwargs)

    def _slice(self, taken: Sequence[fx.Node]) -> fx.Node | None:
        """Successive indices of one tensor; of the one that is written, as it was before."""
        sources = {self.base if node.args[0] in self.written else node.args[0] for node in taken}
        dim, start = _place(taken[0])
        if len(sources) > 1 or dim != self.dim:
            return None
        if [_place(node) for node in taken] != [(dim, start + step) for step in range(len(taken))]:
            return None
        spec = self._spec(taken[0])
        return self._call(aten.slice.Tensor, spec, *sources, dim, start, start + len(taken))

    def _scaled(self, products: Sequence[fx.Node]) -> fx.Node | None:
        """Products with numbers, as with a vector of them; rounded once, as those are."""
        x, numbers = self._all([node.args[0] for node in products]), [node.args[1] for node in products]
        spec = self._spec(products[0])
        kind = spec.dtype
        if self.recorder is None or x is None or x.meta[SPEC].dtype != kind or not kind.is_floating_point:
            return None
        if not all(isinstance(number, (int, float)) for number in numbers):
            return None
        inside = torch.float32 if kind in _ROUNDED else kind
        shape = [-1 if dim == self.dim else 1 for dim in range(len(spec.shape))]
        with torch.inference_mode(False):
            vector = torch.tensor(numbers, dtype=inside).reshape(shape)
        name = self.recorder.keep(vector)
        self.recorder.placed[name] = self.recorder.device
        held = self.graph.create_node("get_attr", f"{CONSTANT}.{name}")
        held.meta = {SPEC: TensorSpec(tuple(vector.shape), inside), WHERE: products[0].meta[WHERE]}
        wide = TensorSpec(spec.shape, inside)
        if inside != kind:
            x = self._call(aten._to_copy.default, wide, x, dtype=inside)
        made = self._call(aten.mul.Tensor, wide, x, held)
        return made if inside == kind else self._call(aten._to_copy.default, spec, made, dtype=kind)

    def _spec(self, row: fx.Node) -> TensorSpec:
        size = len(self.steps)
        return TensorSpec((*self.row[: self.dim], size, *self.row[self.dim :]), row.meta[SPEC].dtype)

    def _call(self, target: Any, spec: TensorSpec, *args: Any, **kwargs: Any) -> fx.Node:
        node = add_node(self.graph, "call_function", target, args, kwargs)
        node.meta = {SPEC: spec, WHERE: self.steps[0].meta[WHERE]}
        return node


def _is_pointwise(target: Any) -> bool:
    if target is aten._to_copy.default:
        return True
    return torch.Tag.pointwise in getattr(target, "tags", ()) and not is_random(target)

"""`group-keys`: keys and values that are repeated for every query head of a group are handed on once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs, operands, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.views import PERMUTES, VIEWS, order_of

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupKeys:
    """Undo `repeat_interleave`, or an expansion that is joined with the heads, in front of an attention: ranks then
    exchange each head of keys once.
    """

    name: ClassVar[str] = "group-keys"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The program with grouped attention where keys and values are repeated alike."""
        return map_graphs(program, _group)


def _group(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is not ops.attention or len(node.meta[SPEC].shape) < 3:
            continue
        given = bound_arguments(node)
        keys, values = (_unrepeated(Emitter(graph, node), given[name]) for name in ("k", "v"))
        if given["enable_gqa"] or keys is None or values is None or keys[1] != values[1]:
            continue
        options = {name: given[name] for name in ("mask", "scale", "is_causal") if given[name] not in (None, False)}
        node.args, node.kwargs = (given["q"], keys[0], values[0]), {**options, "enable_gqa": True}
    remove_dead(graph)


def _unrepeated(emitter: Emitter, x: fx.Node) -> tuple[fx.Node, int] | None:
    """The value before its heads (third dim from the right) were repeated, and how often they were."""
    dims = list(range(len(x.meta[SPEC].shape)))
    while x.target in PERMUTES:
        before = order_of(x, len(dims))
        dims, x = [before[d] for d in dims], operands(x)[0]
    found = _interleaved(x, dims[-3]) or _expanded(emitter, x, dims[-3])
    return None if found is None else (emitter.permute(found[0], dims), found[1])


def _interleaved(x: fx.Node, heads: int) -> tuple[fx.Node, int] | None:
    if x.target is not aten.repeat_interleave.self_int:
        return None
    given = bound_arguments(x)
    along = given["dim"] is not None and given["dim"] % len(x.meta[SPEC].shape) == heads
    return (given["self"], given["repeats"]) if along else None


def _expanded(emitter: Emitter, x: fx.Node, heads: int) -> tuple[fx.Node, int] | None:
    """`[..., heads, 1, ...]` expanded to `[..., heads, group, ...]` and joined."""
    wide = operands(x)[0] if x.target in VIEWS else None
    if wide is None or wide.target is not aten.expand.default:
        return None
    source = operands(wide)[0]
    narrow, shape, joined = (node.meta[SPEC].shape for node in (source, wide, x))
    group = shape[heads + 1] if len(shape) == len(joined) + 1 else 1
    repeats = group > 1 and narrow == (*shape[: heads + 1], 1, *shape[heads + 2 :])
    if not repeats or joined != (*shape[:heads], shape[heads] * group, *shape[heads + 2 :]):
        return None
    return emitter.reshape(source, (*shape[: heads + 1], *shape[heads + 2 :])), group

"""`drop-casts`: an operator on single elements reads values of a narrower type as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir.buffer_ops import Slot
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs, remove_dead
from xdit_ir.ir.program import SPEC, Program, TensorSpec

aten = torch.ops.aten
PROMOTING = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True)
class DropCasts:
    """A cast to a wider type, all of whose users are sums and products with values of that type, is left out: these
    widen what they read, which is exact, and computes the same. A compiler sees to that itself.
    """

    name: ClassVar[str] = "drop-casts"
    numerics: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    def apply(self, program: Program) -> Program:
        """The program without such casts."""
        return map_graphs(program, _drop)


def _drop(graph: fx.Graph) -> None:
    if any(isinstance(node.target, Slot) for node in graph.nodes):
        return  # what a cast reads of a buffer may be another thing when it is used
    for node in graph.nodes:
        if _widens(node) and node.users and all(_widens_itself(user, node) for user in node.users):
            node.replace_all_uses_with(node.args[0])  # one after the other: the other operand has its cast still
    remove_dead(graph, lambda node: not _widens(node))


def _widens(node: fx.Node) -> bool:
    """Whether a node does nothing but to give floating-point numbers a wider type."""
    if node.target is not aten._to_copy.default or list(node.kwargs) != ["dtype"] or not _is_tensor(node.args[0]):
        return False
    before, after = _dtype(node.args[0]), _dtype(node)
    floats = before.is_floating_point and after.is_floating_point
    return floats and 1 < before.itemsize < after.itemsize  # of float8 PyTorch widens nothing itself


def _widens_itself(user: fx.Node, cast: fx.Node) -> bool:
    """Whether an operator computes in the type of a cast, for its other operand's sake."""
    if user.target not in PROMOTING or user.kwargs or len(user.args) != 2:
        return False
    others = [one for one in user.args if one is not cast]
    return len(others) == 1 and _is_tensor(others[0]) and _dtype(others[0]) == _dtype(cast)


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor whose type counts in a promotion, as that of one without dimensions does not."""
    return isinstance(value, fx.Node) and len(value.meta[SPEC].shape) > 0


def _dtype(node: Any) -> torch.dtype:
    spec: TensorSpec = node.meta[SPEC]
    return spec.dtype

"""`choose-kernels`: which kernel each attention of a rank gets, by its shape and the GPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.collective_ops import Ring
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import map_graphs
from xdit_ir.ir.partial_attention import partial_attention
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.kernels.attention import KernelAttention
from xdit_ir.kernels.backends import Problem, choose


@dataclass(frozen=True)
class ChooseKernels:
    """Give attentions the kernels of `xdit_ir.kernels.backends`: "auto" takes the fastest that is installed and can do
    it on a GPU of this compute capability, a name that one wherever it can; the others are left to PyTorch. Where keys
    travel around a ring, those of each member have a kernel. `recorded`: the forward becomes a CUDA graph.
    """

    name: ClassVar[str] = "choose-kernels"
    numerics: ClassVar[str] = "reassociated"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.LOCAL})

    capability: tuple[int, int] = (9, 0)
    attention: str = "auto"
    recorded: bool = False

    def apply(self, program: Program) -> Program:
        """The program whose attentions name their kernels."""
        return map_graphs(program, self._choose)

    def _choose(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, Ring):
                node.target = replace(node.target, kernels=tuple(self._ring(node, node.target)))
            elif node.target in (ops.attention, partial_attention):
                self._attention(node, partial=node.target is partial_attention)

    def _attention(self, node: fx.Node, *, partial: bool) -> None:
        given, problem = _arguments(node), self._problem(node)
        if given.get("parts") is not None:
            return
        problem = _all_heads(problem, problem.k[-2]) if partial else problem
        backend = choose(self.attention, problem, lse=partial)
        if backend is not None:
            node.target, node.args = KernelAttention(backend.name, partial), tuple(given[name] for name in "qkv")
            options = {name: given.get(name) for name in ("scale", "is_causal", "enable_gqa")}
            node.kwargs = {name: value for name, value in options.items() if value is not None and value is not False}

    def _ring(self, node: fx.Node, target: Ring) -> Iterator[str]:
        """A kernel for the keys of each member, which come with as many heads as queries have."""
        problem = self._problem(node)
        for count in target.keys:
            backend = choose(self.attention, _all_heads(problem, count), lse=True)
            yield "" if backend is None else backend.name

    def _problem(self, node: fx.Node) -> Problem:
        given = _arguments(node)
        q, k, v = (given[name].meta[SPEC] for name in ("q", "k", "v"))
        masked, causal = given.get("mask") is not None, bool(given.get("is_causal"))
        return Problem(q.shape, k.shape, v.shape, q.dtype, self.capability, masked, causal, self.recorded)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Those of an attention, or of a ring, which takes what an attention takes."""
    function = partial_attention if node.target is partial_attention else ops.attention
    return inspect.signature(function).bind(*node.args, **node.kwargs).arguments


def _all_heads(problem: Problem, keys: int) -> Problem:
    """The same for so many keys, with as many heads of them as of queries."""
    part = (*problem.q[:-2], keys)
    return replace(problem, k=(*part, problem.k[-1]), v=(*part, problem.v[-1]))

"""One operator as a program, run by all ranks in this process, its result compared shard by shard."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ir_examples import Sample
from ir_strategies import shard
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.layout import Layout
from xdit_ir.mesh import Mesh
from xdit_ir.program import LAYOUT, SPEC, Program, TensorSpec
from xdit_ir.propagate import Propagation
from xdit_ir.simulate import run_ranks
from xdit_ir.specialize import Specialize
from xdit_ir.verify import verify

CPU = torch.device("cpu")


def spec_of(value: Any) -> Any:
    """Type of a tensor, or of a sequence of them."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    return tuple(spec_of(one) for one in value)


def tensors_of(sample: Sample) -> list[torch.Tensor]:
    """The operands of a call, each once."""
    leaves = pytree.tree_leaves((sample.args, sample.kwargs))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())


class OneOperator:
    """A program that calls one operator (node `op`) on its inputs, and what the operator gives for whole operands."""

    def __init__(self, sample: Sample) -> None:
        self.sample, self.inputs = sample, tensors_of(sample)
        result = sample.target(*sample.args, **sample.kwargs)
        several = not isinstance(result, torch.Tensor)
        self.results = list(result) if several else [result]
        self.graph = fx.Graph()
        self.places = [self._node(self.graph.placeholder(f"x{i}"), x) for i, x in enumerate(self.inputs)]
        places = {id(x): place for x, place in zip(self.inputs, self.places, strict=True)}
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: places[id(x)], (sample.args, sample.kwargs))
        self.op = self.graph.create_node("call_function", sample.target, args, kwargs, name="op")
        self._node(self.op, result)
        self.picked = [self.op]
        if several:
            pairs = enumerate(self.results)
            self.picked = [self._node(self.graph.call_function(operator.getitem, (self.op, i)), x) for i, x in pairs]
        self.graph.output(tuple(self.picked))

    def _node(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta[SPEC] = spec_of(value)
        return node

    def propagate(self, mesh: Mesh, seeds: Mapping[str, Layout]) -> Program:
        """The program with layouts, verified."""
        program = Program("one", self.graph, {}, None, {}, CPU)  # type: ignore[arg-type]
        divided = Propagation(program, mesh).run(seeds).replace(mesh=mesh)
        verify(divided)
        return divided

    def check(self, mesh: Mesh, divided: Program) -> None:
        """Run all ranks, and compare each one's part of the results, and the gathered results."""
        seen: dict[tuple[int, str], Any] = {}

        def observe(rank: int, prefix: str, node: fx.Node, value: Any) -> None:
            seen[rank, node.name] = value

        ranks = [Specialize(rank).apply(divided) for rank in range(mesh.world_size)]
        outputs = run_ranks(ranks, lambda name: torch.empty(0), self.inputs, CPU, observe)
        node = next(node for node in divided.graph.nodes if node.name == "op")
        layouts = node.meta[LAYOUT] if len(self.picked) > 1 or self.picked[0] is not self.op else [node.meta[LAYOUT]]
        for place, (layout, wanted) in enumerate(zip(layouts, self.results, strict=True)):
            values = [seen[rank, "op"] for rank in range(mesh.world_size)]
            parts = [value if self.picked[0] is self.op else value[place] for value in values]
            self._compare(mesh, layout, parts, wanted)
        for output, wanted in itertools.product(outputs, [self.results]):
            for got, want in zip(output, wanted, strict=True):
                self._equal(got, want)

    def _compare(self, mesh: Mesh, layout: Layout, parts: Sequence[torch.Tensor], wanted: torch.Tensor) -> None:
        for rank in range(mesh.world_size):
            got = parts[rank]
            if layout.partial:
                got = sum(parts[member] for member in mesh.group(rank, layout.partial))
            self._equal(got, shard(wanted, layout, rank))

    def _equal(self, got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        if self.sample.contents:
            close = got.dtype.is_floating_point and got.dtype != torch.float64
            torch.testing.assert_close(got, wanted, rtol=1e-4 if close else 1e-9, atol=1e-4 if close else 1e-9, equal_nan=True)



"""One operator as a program, run by all ranks in this process, its result compared shard by shard."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from ir_examples import Sample
from ir_strategies import shard
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.sharding.propagate import Propagation
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.sharding.verify import verify
from xdit_ir.simulation.lockstep import run_ranks

CPU = torch.device("cpu")


def spec_of(value: Any) -> Any:
    """Type of a tensor, or of a sequence of them."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    return tuple(spec_of(one) for one in value)


def the_operator(program: Program) -> fx.Node:
    """The node of the operator in question."""
    return next(node for node in program.graph.nodes if node.name == "op")


class OneOperator:
    """A call of one operator, its operands in the order of their use, and what it gives for whole operands."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        leaves = pytree.tree_leaves((sample.args, sample.kwargs))
        self.inputs = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
        result = sample.target(*sample.args, **sample.kwargs)
        self.several = not isinstance(result, torch.Tensor)
        self.result = result
        self.results: list[torch.Tensor] = list(result) if self.several else [result]

    def program(self, taken: Sequence[Layout] = (), wanted: Sequence[Layout] = ()) -> Program:
        """Inputs in these layouts (whole if not given), the operator (node `op`), results brought into those."""
        graph = fx.Graph()

        def add(node: fx.Node, value: Any, layout: Layout | None) -> fx.Node:
            node.meta[SPEC] = spec_of(value)
            if layout is None:
                return node
            cut = graph.call_function(ops.shard, (node,))
            cut.meta = {SPEC: node.meta[SPEC], LAYOUT: layout}
            return cut

        def at(layouts: Sequence[Layout], place: int) -> Layout | None:
            return layouts[place] if layouts else None

        places = {id(x): graph.placeholder(f"x{i}") for i, x in enumerate(self.inputs)}
        for i, x in enumerate(self.inputs):
            places[id(x)] = add(places[id(x)], x, at(taken, i))
        arguments = self.sample.args, self.sample.kwargs
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: places[id(x)], arguments)
        op = graph.create_node("call_function", self.sample.target, args, kwargs, name="op")
        if self.several:
            add(op, self.result, None)
            parts = [graph.call_function(operator.getitem, (op, i)) for i in range(len(self.results))]
        else:
            parts = [op]
        graph.output(
            tuple(add(part, x, at(wanted, i)) for i, (part, x) in enumerate(zip(parts, self.results, strict=True)))
        )
        return Program("one", graph, {}, None, {}, CPU)  # type: ignore[arg-type]

    def propagate(self, mesh: Mesh, program: Program) -> Program:
        """The program with layouts, verified."""
        divided = Propagation(program, mesh).run().replace(mesh=mesh)
        verify(divided)
        return divided

    def check(self, mesh: Mesh, divided: Program) -> None:
        """Run all ranks, and compare each one's part of the results (where it is not lowered) and the whole."""
        values: dict[int, Any] = {}

        def observe(rank: int, prefix: str, node: fx.Node, value: Any) -> None:
            if node.name == "op":
                values[rank] = value

        lowered = SplitStatistics().apply(divided)
        ranks = [Specialize(rank).apply(lowered) for rank in range(mesh.world_size)]
        outputs = run_ranks(ranks, lambda name: torch.empty(0), self.inputs, CPU, observe)
        layouts = the_operator(divided).meta[LAYOUT]
        for place, wanted in enumerate(self.results):
            layout = layouts[place] if self.several else layouts
            parts = {rank: value[place] if self.several else value for rank, value in values.items()}
            for rank in values:
                group = mesh.group(rank, layout.partial)
                got = parts[rank] if len(group) == 1 else sum(parts[member] for member in group)
                self._equal(got, shard(wanted, layout, rank))
            for output in outputs:
                self._equal(output[place], wanted)

    def _equal(self, got: Any, wanted: torch.Tensor) -> None:
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        if self.sample.contents and not torch.equal(got, wanted):
            short = got.dtype.is_floating_point and got.dtype != torch.float64
            bound = 1e-4 if short else 1e-9
            torch.testing.assert_close(got, wanted, rtol=bound, atol=bound, equal_nan=True)

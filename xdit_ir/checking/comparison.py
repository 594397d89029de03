"""Values of a run beside those that they should be: which are wrong, on which ranks, and by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.dataflow import Expanded
from xdit_ir.ir.difference import Difference, relative, shard_of
from xdit_ir.ir.graphs import OUTER
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec, call_parts, called_block, is_block_call

UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided")
# A node where it runs: the block call (the prefix of its parameters; empty: outer graph), and its name.
Key = tuple[str, str]
Values = dict[Key, Any]


@dataclass
class Wrong:
    """A value that differs: on which ranks, and what the first of them has instead of what."""

    ranks: list[int | None]
    error: float
    got: torch.Tensor
    whole: torch.Tensor
    layout: Layout

    @property
    def difference(self) -> Difference:
        """How what the first rank has differs from its part."""
        rank = self.ranks[0] or 0
        return Difference.of(self.got, shard_of(self.whole, self.layout, rank), self.layout, rank)


@dataclass
class Comparison:
    """Compares values, as they appear, with the expected ones of the same nodes.

    What is `wrong` is kept, not only the first, and what was `seen` at all.
    """

    program: Program
    tolerance: float
    expected: Values
    wrong: dict[Key, Wrong] = field(default_factory=dict)
    seen: set[Key] = field(default_factory=set)
    sums: dict[tuple[Key, int, tuple[int, ...]], list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = call_names(self.program)
        self.calls = {self.names[call.name]: call for call in self.program.calls}
        self.expanded = Expanded(self.program)
        self.nodes: dict[Key, fx.Node] = {}
        for prefix, graph in self._graphs():
            self.nodes |= {(prefix, node.name): node for node in graph.nodes}

    def _graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """In order of execution, but for the outer graph, of which parts run before."""
        yield OUTER, self.program.graph
        for prefix, call in self.calls.items():
            yield prefix, self.program.blocks[called_block(call)].graph

    def key(self, site: str, name: str) -> Key:
        """Where a node of a rank's program is in this one."""
        return self.names.get(site, site), name

    def compare(self, rank: int, site: str, node: fx.Node, value: Any) -> None:
        """Compare a rank's value with the part that it should hold; of all ranks together, if a sum is pending."""
        self.compare_at(rank, self.key(site, node.name), value)

    def compare_at(self, rank: int | None, key: Key, value: Any) -> None:
        """Compare a value of one device (no rank), or of a rank."""
        here = self.nodes.get(key)
        if here is None or here.op != "call_function" or is_block_call(here) or _is_uninitialised(here):
            return
        if key not in self.expected:
            return
        for got, whole, spec, layout in _parts(value, self.expected[key], here):
            if whole.shape != spec.shape:
                return  # another value of the same name
            if rank is None:
                self._judge(key, rank, got, whole, Layout.whole(whole.dim()))
            elif layout.partial:
                self._add_up(key, rank, got, whole, layout)
            else:
                self._judge(key, rank, got, whole, layout)

    def _judge(self, key: Key, rank: int | None, got: torch.Tensor, whole: torch.Tensor, layout: Layout) -> None:
        self.seen.add(key)
        error = relative(got, shard_of(whole, layout, rank or 0))
        if error <= self.tolerance:
            return
        if key in self.wrong:
            self.wrong[key].ranks.append(rank)
        else:
            self.wrong[key] = Wrong([rank], error, got, whole, layout)

    def _add_up(self, key: Key, rank: int, got: torch.Tensor, whole: torch.Tensor, layout: Layout) -> None:
        """Collect the summands of a pending sum until its group is complete."""
        mesh = self.mesh
        group = mesh.group(rank, layout.partial)
        summands = self.sums.setdefault((key, id(whole), group), [])
        summands.append(got)
        if len(summands) == len(group):
            del self.sums[key, id(whole), group]
            same = all(summand.shape == got.shape for summand in summands)
            total = torch.stack(summands).sum(0) if same else got
            self._judge(key, rank, total, whole, layout)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the program's ranks."""
        assert self.program.mesh is not None
        return self.program.mesh


def call_names(program: Program) -> dict[str, str]:
    """Block calls by the prefix of their parameters, counted where several have the same; `""` is the outer graph."""
    names, times = {OUTER: OUTER}, Counter[str]()
    for call in program.calls:
        prefix = call_parts(call)[1]
        times[prefix] += 1
        names[call.name] = prefix if times[prefix] == 1 else f"{prefix} (call {times[prefix]})"
    return names


def _is_uninitialised(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in UNINITIALISED


def _parts(value: Any, whole: Any, node: fx.Node) -> Iterator[tuple[torch.Tensor, torch.Tensor, TensorSpec, Layout]]:
    """The tensors of a value with the expected ones, their types and layouts."""
    spec, layout = node.meta[SPEC], node.meta.get(LAYOUT)
    if isinstance(spec, TensorSpec):
        if isinstance(whole, torch.Tensor):
            yield value, whole, spec, layout or Layout.whole(len(spec.shape))
        return
    layouts = layout or tuple(Layout.whole(len(one.shape)) for one in spec)
    if isinstance(whole, (tuple, list)) and len(whole) == len(spec):
        yield from zip(value, whole, spec, layouts, strict=True)

"""Find the first value that is not what it should be: of the rewritten program on one device, then of each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.api import Example, ParallelProgram, split_example
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import bind_inputs
from xdit_ir.errors import ExecutionError
from xdit_ir.ir.dataflow import Expanded, ProgramValue
from xdit_ir.ir.difference import Difference, ranges, relative, shard_of
from xdit_ir.ir.graphs import results_of
from xdit_ir.ir.interpret import Interpreter, State, model_state
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, Program, TensorSpec, call_parts, is_block_call, where_of

UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided")
OUTER = ""
# A node where it runs: the block call (the prefix of its parameters; empty: outer graph), and its name.
Key = tuple[str, str]
Values = dict[Key, Any]


@dataclass(frozen=True)
class Divergence:
    """The first value that is not what the single-device program computes.

    `rank` is None where the rewritten program computes something else on one device too: then a pass is wrong, not a
    rank's part. Under PipeFusion it counts `(cfg, patch, ring, ulysses)`. `node` is of `block` (a parameter prefix;
    empty: outer graph), `source` the line of the model that it came from.
    """

    block: str
    node: str
    source: str
    rank: int | None
    relative_error: float
    difference: Difference | None = None
    who: str = ""
    problem: str = ""

    @property
    def place(self) -> tuple[str, int] | None:
        """File and line of the source, where known."""
        file, _, rest = self.source.partition(":")
        number = rest.partition(":")[0]
        return (file, int(number)) if number.isdigit() else None

    def __str__(self) -> str:
        where = "one device" if self.rank is None else f"rank {self.rank}"
        lines = [
            f"first divergence: {self.block or 'outer graph'}, {self.node} on {where}, relative error "
            f"{self.relative_error:.2e}",
            self.source or "no source line known",
        ]
        lines += [text for text in (self.who, self.problem) if text]
        lines += self.difference.lines() if self.difference is not None else []
        return "\n  ".join(lines)


def first_divergence(
    parallel: ParallelProgram, model: nn.Module, examples: Sequence[Example], tolerance: float
) -> Divergence | None:
    """The first value that differs, in the last of consecutive steps; the examples before it lead there.

    Three programs are compared, each with the one before: the canonical one with that which was traced, the divided
    one, run on one device, with the canonical one, and each rank with the divided one.
    """
    example = examples[-1]
    inputs = bind_inputs(model, parallel.original, *split_example(example))
    state = model_state(parallel.original, model)
    traced = program_values(parallel.original, state, inputs)
    for program, reason in (
        (parallel.analysed, "on one device too: an analysis pass is wrong"),
        (parallel.ir, "on one device too: a pass is wrong, or what followed it; not the division itself"),
    ):
        values = program_values(program, state, inputs)
        found = _rewritten(program, traced, values, tolerance, reason)
        if found is not None:
            return found
        traced = values
    comparison = _Comparison(parallel.ir, tolerance, traced)
    try:
        with torch.no_grad():
            parallel.simulate_steps(model, [copied(one) for one in examples], comparison.compare)
    except ExecutionError as error:
        place = comparison.key(error.site, error.node)
        return comparison.cause(place) or _failed(comparison, error, place)
    return comparison.cause()


def program_values(program: Program, state: State, inputs: Sequence[torch.Tensor]) -> Values:
    """Every value of a program on one device."""
    values: Values = {}
    names = call_names(program)

    def keep(site: str, node: fx.Node, value: Any) -> None:
        values[names[site], node.name] = value

    with torch.no_grad():
        Interpreter(program, state, inputs[0].device, keep).run(inputs)
    return values


def _rewritten(program: Program, before: Values, after: Values, tolerance: float, reason: str) -> Divergence | None:
    """The first value of a rewritten program that differs, on one device, from the one of the same name."""
    comparison = _Comparison(program, tolerance, before, reason)
    for key, value in after.items():
        comparison.compare_at(None, key, value)
    return comparison.cause()


def _failed(comparison: _Comparison, error: ExecutionError, place: Key) -> Divergence:
    """A node that could not be run although what it was given is right."""
    node = comparison.nodes.get(place)
    source = "" if node is None else source_of(place[0], node)
    return Divergence(*place, source, error.rank, float("inf"), problem=f"cannot be run: {error.reason}")


@dataclass
class _Wrong:
    """A value that differs: on which ranks, and what the first of them has instead of what."""

    ranks: list[int | None]
    error: float
    got: torch.Tensor
    whole: torch.Tensor
    layout: Layout

    @property
    def difference(self) -> Difference:
        rank = self.ranks[0] or 0
        return Difference.of(self.got, shard_of(self.whole, self.layout, rank), self.layout, rank)


@dataclass
class _Comparison:
    """Compares values, as they appear, with the expected ones of the same nodes.

    What is wrong is kept, not only the first: a value counts as the cause only if what is wrong in the end follows
    from it.
    """

    program: Program
    tolerance: float
    expected: Values
    reason: str = ""
    wrong: dict[Key, _Wrong] = field(default_factory=dict)
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
            yield prefix, self.program.blocks[str(call.args[0])].graph

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
            self.wrong[key] = _Wrong([rank], error, got, whole, layout)

    def _add_up(self, key: Key, rank: int, got: torch.Tensor, whole: torch.Tensor, layout: Layout) -> None:
        """Collect the summands of a pending sum until its group is complete."""
        mesh = self._mesh()
        group = mesh.group(rank, layout.partial)
        summands = self.sums.setdefault((key, id(whole), group), [])
        summands.append(got)
        if len(summands) == len(group):
            del self.sums[key, id(whole), group]
            same = all(summand.shape == got.shape for summand in summands)
            total = torch.stack(summands).sum(0) if same else got
            self._judge(key, rank, total, whole, layout)

    def _mesh(self) -> Mesh:
        assert self.program.mesh is not None
        return self.program.mesh

    def cause(self, end: Key | None = None) -> Divergence | None:
        """The first wrong value from which, by wrong values only, what is wrong in the end follows.

        `end` is a node that failed; without one the outputs are meant.
        """
        ends = [end] if end is not None else self._outputs()
        reached: set[Key] = set()
        todo = [key for start in ends for key in self._sources(start)] if end is not None else ends
        while todo:
            key = todo.pop()
            if key in reached or (key in self.seen and key not in self.wrong):
                continue
            reached.add(key)
            todo += self._sources(key)
        first = next((key for key in self._order() if key in reached and key in self.wrong), None)
        return None if first is None else self._describe(first)

    def _outputs(self) -> list[Key]:
        return [(OUTER, value.name) for value in results_of(self.program.graph)]

    def _order(self) -> Iterator[Key]:
        """Nodes in the order in which they run."""
        for node in self.program.graph.nodes:
            if is_block_call(node):
                body = self.program.blocks[call_parts(node)[0]].graph
                yield from ((self.names[node.name], inner.name) for inner in body.nodes)
            yield OUTER, node.name

    def _sources(self, key: Key) -> list[Key]:
        """What a value is computed from, into and out of blocks."""
        node = self.nodes.get(key)
        if node is None:
            return []
        value = ProgramValue(self.calls.get(key[0]), node)
        same = self.expanded.resolved(value)
        sources = self.expanded.sources(value) if same == value else [same]
        return [(OUTER if one.call is None else self.names[one.call.name], one.node.name) for one in sources]

    def _describe(self, key: Key) -> Divergence:
        prefix, name = key
        wrong, node = self.wrong[key], self.nodes[key]
        who = self.reason if wrong.ranks[0] is None else _who([r for r in wrong.ranks if r is not None], self._mesh())
        what = f"{name} ({getattr(node.target, '__name__', node.target)})"
        return Divergence(
            prefix,
            name,
            source_of(prefix, node),
            wrong.ranks[0],
            wrong.error,
            wrong.difference,
            f"{what}: {who}",
        )


def _who(ranks: list[int], mesh: Mesh) -> str:
    """Which ranks are wrong."""
    wrong = sorted(set(ranks))
    time = f", {TIME} counts patches" if mesh.size((TIME,)) > 1 else ""
    if len(wrong) == mesh.world_size:
        return f"wrong on all {mesh.world_size} ranks{time}"
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.degrees.items())
    return f"wrong on rank {ranges(wrong)} of 0-{mesh.world_size - 1} (mesh {sizes}{time})"


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


def source_of(prefix: str, node: fx.Node) -> str:
    """The model's source line and the module of a node."""
    where = where_of(node)
    module = where.below(prefix)
    return f"{where.source} (module {module})" if module else where.source


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

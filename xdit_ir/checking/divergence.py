"""Find the first value that is not what it should be: of the rewritten program on one device, then of each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.api import ParallelProgram
from xdit_ir.capture.binder import bind_inputs
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import Example, split_example
from xdit_ir.checking.comparison import Comparison, Key, Values, call_names
from xdit_ir.errors import ExecutionError
from xdit_ir.ir.dataflow import ProgramValue
from xdit_ir.ir.difference import Difference, ranges
from xdit_ir.ir.graphs import OUTER, results_of
from xdit_ir.ir.interpret import Interpreter, State, model_state
from xdit_ir.ir.mesh import TIME, Mesh
from xdit_ir.ir.program import Program, call_parts, is_block_call, where_of


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
    comparison = Comparison(parallel.ir, tolerance, traced)
    try:
        with torch.no_grad():
            parallel.simulate_steps(model, [copied(one) for one in examples], comparison.compare)
    except ExecutionError as error:
        place = comparison.key(error.site, error.node)
        return _cause(comparison, place) or _failed(comparison, error, place)
    return _cause(comparison)


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
    comparison = Comparison(program, tolerance, before)
    for key, value in after.items():
        comparison.compare_at(None, key, value)
    return _cause(comparison, reason=reason)


def _failed(comparison: Comparison, error: ExecutionError, place: Key) -> Divergence:
    """A node that could not be run although what it was given is right."""
    node = comparison.nodes.get(place)
    source = "" if node is None else source_of(place[0], node)
    return Divergence(*place, source, error.rank, float("inf"), problem=f"cannot be run: {error.reason}")


def _cause(found: Comparison, end: Key | None = None, *, reason: str = "") -> Divergence | None:
    """The first wrong value from which, by wrong values only, what is wrong in the end follows.

    `end` is a node that failed; without one the outputs are meant. `reason` is said of what is wrong on one device.
    """
    outputs = ((OUTER, value.name) for value in results_of(found.program.graph))
    reached: set[Key] = set()
    todo = list(outputs) if end is None else _sources(found, end)
    while todo:
        key = todo.pop()
        if key in reached or (key in found.seen and key not in found.wrong):
            continue
        reached.add(key)
        todo += _sources(found, key)
    first = next((key for key in _order(found) if key in reached and key in found.wrong), None)
    return None if first is None else _describe(found, first, reason)


def _order(found: Comparison) -> Iterator[Key]:
    """Nodes in the order in which they run."""
    for node in found.program.graph.nodes:
        if is_block_call(node):
            body = found.program.blocks[call_parts(node)[0]].graph
            yield from ((found.names[node.name], inner.name) for inner in body.nodes)
        yield OUTER, node.name


def _sources(found: Comparison, key: Key) -> list[Key]:
    """What a value is computed from, into and out of blocks."""
    node = found.nodes.get(key)
    if node is None:
        return []
    value = ProgramValue(found.calls.get(key[0]), node)
    same = found.expanded.resolved(value)
    sources = found.expanded.sources(value) if same == value else [same]
    return [(OUTER if one.call is None else found.names[one.call.name], one.node.name) for one in sources]


def _describe(found: Comparison, key: Key, reason: str) -> Divergence:
    prefix, name = key
    wrong, node = found.wrong[key], found.nodes[key]
    who = reason if wrong.ranks[0] is None else _who([r for r in wrong.ranks if r is not None], found.mesh)
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


def source_of(prefix: str, node: fx.Node) -> str:
    """The model's source line and the module of a node."""
    where = where_of(node)
    module = where.below(prefix)
    return f"{where.source} (module {module})" if module else where.source

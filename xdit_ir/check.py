"""Prove that a parallel program computes what the model computes, and where it first does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_ir import ops
from xdit_ir.api import Example, ParallelProgram, TracedProgram, run_single, trace
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import bind_example, bind_inputs, flatten_named
from xdit_ir.displacement import latents
from xdit_ir.interpret import Interpreter, model_state
from xdit_ir.layout import Layout
from xdit_ir.partition import Indices
from xdit_ir.program import LAYOUT, SPEC, WHERE, Program, Where, call_parts, is_block_call

# Displaced steps within which a change of the latents must have worn off: one for each layer would always do.
REPEATS = (4, 16)
UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided")


@dataclass(frozen=True)
class Divergence:
    """The first value, in execution order, that is not what the single-device program computes."""

    block: str
    node: str
    source: str
    rank: int
    relative_error: float
    statistics: str

    def __str__(self) -> str:
        return (
            f"first divergence: {self.block or 'outer graph'}, {self.node} on rank {self.rank}, relative error "
            f"{self.relative_error:.2e}\n  {self.source or 'no source line known'}\n  {self.statistics}"
        )


@dataclass(frozen=True)
class CheckResult:
    """Whether every rank's output is the module's, within `tolerance`; `str()` explains."""

    ok: bool
    max_relative_error: float
    tolerance: float
    world_size: int
    first_divergence: Divergence | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "DIFFERENT"
        lines = [
            f"{verdict}: {self.world_size} ranks, largest relative error {self.max_relative_error:.2e} "
            f"(tolerance {self.tolerance:.0e})",
            *self.notes,
        ]
        if self.first_divergence is not None:
            lines.append(str(self.first_divergence))
        return "\n".join(lines)


def check(
    model: nn.Module, example: Example, *, tolerance: float = 1e-5, traced: TracedProgram | None = None, **degrees: Any
) -> CheckResult:
    """Trace, divide, simulate every rank and compare with the module itself; no GPU and no processes.

    Args:
        model: the module with real weights; `example`: its arguments, as for `trace`.
        tolerance: largest accepted relative error (Frobenius norm) of any output tensor on any rank.
        traced: an earlier trace of the same model and example, to save time.
        degrees: as for `TracedProgram.parallelize`.

    Raises:
        XditError: the model cannot be captured or the degrees are illegal.
    """
    traced = trace(model, example) if traced is None else traced
    return check_parallel(traced.parallelize(**degrees), model, example, tolerance=tolerance)


def check_parallel(
    parallel: ParallelProgram, model: nn.Module, example: Example, *, tolerance: float = 1e-5
) -> CheckResult:
    """`check` for a program that is already divided."""
    with torch.no_grad():
        expected = _results(model, example, lambda given: [_call(model, given)])[0]
    notes = []
    alone = _results(model, example, lambda given: [run_single(parallel.original, model, given)])[0]
    captured = relative_error(alone, expected)
    if captured > tolerance:
        notes.append(f"the captured program itself differs from the module by {captured:.2e}: a defect of capture")
    outputs = _results(model, example, lambda given: parallel.simulate(model, given))
    worst = max(relative_error(output, expected) for output in outputs)
    found = None if worst <= tolerance else first_divergence(parallel, model, example, max(tolerance, 1e-5))
    if found is None and parallel.pipeline is not None:
        later, more = _later_steps(parallel, model, example, expected, tolerance)
        worst = max(worst, later)
        notes += more
    return CheckResult(worst <= tolerance, worst, tolerance, parallel.world_size, found, tuple(notes))


def _away(output: Any, expected: list[torch.Tensor]) -> float:
    """The relative error of an output; what the model leaves in caches is not compared."""
    tensors = _tensors(output)
    return relative_error(tensors, expected[: len(tensors)])


def _later_steps(
    parallel: ParallelProgram, model: nn.Module, example: Example, expected: list[torch.Tensor], tolerance: float
) -> tuple[float, list[str]]:
    """The largest error of displaced steps where PipeFusion promises the model's output: after a step with equal
    inputs, and after enough of them when the steps before had others."""
    assert parallel.pipeline is not None
    warmup = parallel.pipeline.warmup_steps
    equal = parallel.simulate_steps(model, [example] * (warmup + 1))[-1]
    worst = max(_away(output, expected) for output in equal)
    notes = [f"a displaced step after one with equal inputs: relative error {worst:.2e}"]
    changed = _changed(parallel, example)
    errors: list[float] = []
    for repeats in REPEATS:
        steps = parallel.simulate_steps(model, [changed] * warmup + [example] * repeats)[warmup:]
        errors = [max(_away(output, expected) for output in step) for step in steps]
        if min(errors) <= tolerance:
            break
    needed = next((step for step, error in enumerate(errors, 1) if error <= tolerance), None)
    after = "no number" if needed is None else str(needed)
    notes.append(f"displaced steps after other latents: relative error {errors[0]:.2e}, equal after {after} of them")
    return max(worst, min(errors)), notes


def _changed(parallel: ParallelProgram, example: Example) -> Example:
    """The example with other latents."""
    assert parallel.pipeline is not None
    names = latents(parallel.ir, parallel.pipeline.virtual)
    inputs = [node for node in parallel.ir.graph.nodes if node.op == "placeholder"]
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    shapes = {(node.meta[SPEC].shape, node.meta[SPEC].dtype) for node in inputs if node.name in names}
    other = {id(x): x + 0.1 * x.flip(-1) for x in tensors if (tuple(x.shape), x.dtype) in shapes}
    return pytree.tree_map(lambda leaf: other.get(id(leaf), leaf), example)  # type: ignore[no-any-return]


def _call(model: nn.Module, example: Example) -> Any:
    return model(*example) if isinstance(example, tuple) else model(**example)


def _results(model: nn.Module, example: Example, run: Callable[[Example], list[Any]]) -> list[list[torch.Tensor]]:
    """The tensors of outputs, and those in caches that the model was given, after a run on a copy of the example."""
    given = copied(example)
    outputs = run(given)
    named = bind_example(model, given)
    kept = [leaf for path, leaf in flatten_named(named)[0] if isinstance(leaf, torch.Tensor) and path not in named]
    return [_tensors(output) + kept for output in outputs]


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative error over corresponding tensors; infinite where shapes differ or a value is not finite."""
    if len(got) != len(expected):
        return float("inf")
    return max((_relative(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    if not got.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = got.to(wide), expected.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, a - b).norm().item()
    scale = torch.where(b.isfinite(), b, 0).norm().item()
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@dataclass
class _Comparison:
    """Compares each rank's values with the single-device values of the same nodes, as they appear."""

    program: Program
    tolerance: float
    expected: dict[tuple[str, str], Any] = field(default_factory=dict)
    order: dict[tuple[str, str], int] = field(default_factory=dict)
    found: tuple[int, Divergence] | None = None

    @cached_property
    def nodes(self) -> dict[tuple[str, str], fx.Node]:
        """The nodes of the divided program, by parameter prefix and name."""
        graphs = [("", self.program.graph)]
        for call in self.program.calls:
            name, prefix, _ = call_parts(call)
            graphs.append((prefix, self.program.blocks[name].graph))
        return {(prefix, node.name): node for prefix, graph in graphs for node in graph.nodes}

    def record(self, prefix: str, node: fx.Node, value: Any) -> None:
        """Remember a single-device value."""
        self.order[prefix, node.name] = len(self.order)
        self.expected[prefix, node.name] = value

    def compare(self, rank: int, prefix: str, node: fx.Node, value: Any) -> None:
        """Compare one rank's value; pending sums have no counterpart on one device."""
        here = self.nodes.get((prefix, node.name))
        if here is None or here.op != "call_function" or is_block_call(here):
            return
        if getattr(getattr(here.target, "overloadpacket", None), "__name__", "") in UNINITIALISED:
            return
        key = (prefix, _counterpart(here).name)
        if key not in self.expected or (self.found is not None and self.order[key] >= self.found[0]):
            return
        for got, whole, layout in _parts(value, self.expected[key], here.meta[LAYOUT]):
            if layout.partial:
                continue
            want = shard_of(whole, layout, rank)
            error = _relative(got, want)
            if error > self.tolerance:
                self.found = self.order[key], _describe(prefix, here, rank, error, got, want)


def _counterpart(node: fx.Node) -> fx.Node:
    """The node whose single-device value this one has: changes of layout have their operand's."""
    while ops.is_relayout(node.target):
        node = node.all_input_nodes[0]
    return node


def _describe(prefix: str, node: fx.Node, rank: int, error: float, got: torch.Tensor, want: torch.Tensor) -> Divergence:
    where: Where = node.meta.get(WHERE, Where())
    module = ".".join(part for part in (prefix, where.module) if part)
    statistics = f"got {_statistics(got)}; expected {_statistics(want)}"
    source = f"{where.source} (module {module})" if module else where.source
    return Divergence(prefix, node.name, source, rank, error, statistics)


def _statistics(x: torch.Tensor) -> str:
    wide = x.abs() if x.is_complex() else x
    wide = wide.double()
    text = f"shape {tuple(x.shape)}"
    return f"{text}, mean {wide.mean():.4g}, std {wide.std(correction=0):.4g}" if x.numel() else text


def _parts(value: Any, whole: Any, layout: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, Layout]]:
    if isinstance(layout, Layout):
        yield value, whole, layout
    else:
        yield from zip(value, whole, layout, strict=True)


def shard_of(whole: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """A rank's part of a global tensor."""
    for dim, partition in enumerate(layout.dims):
        if partition is not None:
            part: Indices = partition.parts[rank]
            whole = whole.index_select(dim, torch.from_numpy(part.array).to(whole.device))
    return whole


def first_divergence(
    parallel: ParallelProgram, model: nn.Module, example: Example, tolerance: float
) -> Divergence | None:
    """Run the undivided program on one device, then every rank, and find the first value that differs."""
    args, kwargs = ((), dict(example)) if not isinstance(example, tuple) else (example, {})
    inputs = bind_inputs(model, parallel.original, args, kwargs)
    comparison = _Comparison(parallel.ir, tolerance)
    state = model_state(parallel.original, model)
    with torch.no_grad():
        Interpreter(parallel.analysed, state, inputs[0].device, comparison.record).run(inputs)
        parallel.simulate(model, copied(example), comparison.compare)
    return None if comparison.found is None else comparison.found[1]

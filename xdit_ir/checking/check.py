"""Prove that a parallel program computes what the model computes, and where it first does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.api import ParallelProgram, PipelinedProgram, TracedProgram, trace
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import Example, bind_example, flatten_named, split_example
from xdit_ir.capture.outputs import output_tensors
from xdit_ir.checking.divergence import Divergence, first_divergence
from xdit_ir.checking.submodule_diff import uncaptured, unrepeatable
from xdit_ir.errors import ExecutionError
from xdit_ir.ir.difference import relative_error
from xdit_ir.reflection.methods import Module, as_module
from xdit_ir.simulation.examples import run_single

# Displaced steps within which a change of the inputs must have worn off: one for each layer would always do.
REPEATS = (4, 16)


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
    model: Module, example: Example, *, tolerance: float = 1e-5, traced: TracedProgram | None = None, **degrees: Any
) -> CheckResult:
    """Trace, divide, simulate every rank and compare with the module itself; no GPU and no processes.

    Args:
        model: the module, or a method of one, with real weights; `example`: its arguments, as for `trace`.
        tolerance: largest accepted relative error (Frobenius norm) of any output tensor on any rank.
        traced: an earlier trace of the same model and example, to save time.
        degrees: as for `TracedProgram.parallelize`.

    Raises:
        XditError: the model cannot be captured or the degrees are illegal.
    """
    model = as_module(model)
    traced = trace(model, example) if traced is None else traced
    return check_parallel(traced.parallelize(**degrees), model, example, tolerance=tolerance)


def check_parallel(
    parallel: ParallelProgram, model: Module, example: Example, *, tolerance: float = 1e-5
) -> CheckResult:
    """`check` for a program that is already divided."""
    return _check_module(parallel, as_module(model), example, tolerance)


def _check_module(parallel: ParallelProgram, model: nn.Module, example: Example, tolerance: float) -> CheckResult:
    with torch.no_grad():
        expected = _results(model, example, lambda given: [_call(model, given)])[0]
    if not expected:
        note = "nothing was compared: no tensor was found in what the module returns, or leaves in its arguments"
        return CheckResult(False, float("inf"), tolerance, parallel.world_size, None, (note,))
    notes = list(_told_by_nothing(expected))
    alone = _results(model, example, lambda given: [run_single(parallel.original, model, given)])[0]
    captured = relative_error(alone, expected)
    if captured > tolerance:
        notes.append(f"the captured program itself differs from the module by {captured:.2e}")
        found = unrepeatable(model, example, tolerance) or uncaptured(parallel, model, example, tolerance)
        return CheckResult(False, captured, tolerance, parallel.world_size, found, tuple(notes))
    [worst] = _errors(lambda: [_results(model, example, lambda given: parallel.simulate(model, given))], expected)
    steps: list[Example] = [example]
    if worst <= tolerance and parallel.pipeline is not None:
        later, steps, more = _later_steps(parallel, model, example, expected, tolerance)
        worst = max(worst, later)
        notes += more
        if worst <= tolerance and (woven := _as_run(parallel, model, example, expected)) > tolerance:
            notes.append(f"the programs that ranks run, made from those of patches and stages: error {woven:.2e}")
            return CheckResult(False, woven, tolerance, parallel.world_size, None, tuple(notes))
    ok = worst <= tolerance
    found = None if ok else first_divergence(parallel, model, steps, max(tolerance, 1e-5))
    if ok:
        with torch.no_grad():
            [outputs] = _results(model, example, lambda given: [_call(model, given)])
        worst = max(worst, relative_error(outputs, expected))
        if worst > tolerance:
            notes.append("the module differs from itself when it is called again: it keeps a state, or draws")
            ok, found = False, unrepeatable(model, example, tolerance)
    return CheckResult(ok, worst, tolerance, parallel.world_size, found, tuple(notes))


def _told_by_nothing(expected: list[torch.Tensor]) -> Iterator[str]:
    """Why equal outputs say little, if they do."""
    if not any(tensor.any() for tensor in expected):
        yield "the model gives nothing but zeros, as where weights begin at zero: what is before them was not compared"
    if not any(tensor.isfinite().any() for tensor in expected):
        yield "no number that the model gives is finite: only where they are was compared"


def _errors(run: Callable[[], list[list[list[torch.Tensor]]]], expected: list[torch.Tensor]) -> list[float]:
    """Per step the largest relative error of any rank's tensors; infinite if some rank's program cannot be run."""
    try:
        return [max(relative_error(output, expected[: len(output)]) for output in step) for step in run()]
    except ExecutionError:
        return [float("inf")]


def _later_steps(
    parallel: ParallelProgram, model: nn.Module, example: Example, expected: list[torch.Tensor], tolerance: float
) -> tuple[float, list[Example], list[str]]:
    """The largest error of displaced steps where PipeFusion promises the model's output: after a step with equal
    inputs, and after enough of them when the steps before had others. Also the steps that lead to the worst one.

    What the model leaves in caches is not compared.
    """
    assert parallel.pipeline is not None
    warmup = parallel.pipeline.warmup_steps

    def displaced(steps: list[Example]) -> list[float]:
        def run() -> list[list[list[torch.Tensor]]]:
            made = parallel.simulate_steps(model, [copied(step) for step in steps])
            return [[output_tensors(output) for output in step] for step in made[warmup:]]

        return _errors(run, expected)

    equal = [example] * (warmup + 1)
    [worst] = displaced(equal)
    notes = [f"a displaced step after one with equal inputs: relative error {worst:.2e}"]
    if worst > tolerance:
        return worst, equal, notes
    changed = _changed(parallel, model, example)
    steps, errors = equal, [0.0]
    for repeats in REPEATS:
        steps = [changed] * warmup + [example] * repeats
        errors = displaced(steps)
        if min(errors) <= tolerance:
            break
    needed = next((step for step, error in enumerate(errors, 1) if error <= tolerance), None)
    after = "no number" if needed is None else str(needed)
    notes.append(f"displaced steps after other inputs: relative error {errors[0]:.2e}, equal after {after} of them")
    return max(worst, min(errors)), steps, notes


def _as_run(parallel: ParallelProgram, model: nn.Module, example: Example, expected: list[torch.Tensor]) -> float:
    """The largest error of the programs that ranks run, in synchronous steps and a displaced one with equal inputs."""
    assert isinstance(parallel, PipelinedProgram)
    steps = [copied(example) for _ in range(parallel.pipeline.warmup_steps + 1)]
    return max(
        _errors(lambda: [list(map(output_tensors, step)) for step in parallel.run_steps(model, steps)], expected)
    )


def _changed(parallel: ParallelProgram, model: nn.Module, example: Example) -> Example:
    """The example with other contents of all tensors but those that the program was made for."""
    signature = parallel.original.signature
    fixed = {guard.path for guard in signature.guards}.union(*(fact.paths for fact in signature.predicates))
    kept = {id(leaf) for path, leaf in flatten_named(bind_example(model, example))[0] if path in fixed}
    return pytree.tree_map(lambda leaf: leaf if id(leaf) in kept else _other(leaf), example)  # type: ignore[no-any-return]


def _other(leaf: Any) -> Any:
    """Similar numbers; of integers, which may be indices, the same ones in another order."""
    if not isinstance(leaf, torch.Tensor) or not leaf.dim() or not leaf.isfinite().all():
        return leaf
    return leaf + 0.1 * leaf.flip(-1) if leaf.is_floating_point() else leaf.flip(0)


def _call(model: nn.Module, example: Example) -> Any:
    args, kwargs = split_example(example)
    return model(*args, **kwargs)


def _results(model: nn.Module, example: Example, run: Callable[[Example], list[Any]]) -> list[list[torch.Tensor]]:
    """The tensors of outputs, and those in caches that the model was given, after a run on a copy of the example."""
    given = copied(example)
    outputs = run(given)
    named = bind_example(model, given)
    kept = [leaf for path, leaf in flatten_named(named)[0] if isinstance(leaf, torch.Tensor) and path not in named]
    return [output_tensors(output) + kept for output in outputs]

"""For test suites of models: one assertion that a model can be divided, and stays right."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from xdit_ir import degrees as short
from xdit_ir.api import TracedProgram, trace
from xdit_ir.capture.inputs import Example, split_example
from xdit_ir.checking.check import check_parallel
from xdit_ir.checking.limits import Limits
from xdit_ir.deferral.deferred import materialize
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.ir.mesh import MESH_DIMS

Degrees = str | Mapping[str, Any]


def assert_parallel(
    model: nn.Module,
    example: Example,
    degrees: Degrees | Iterable[Degrees] = ("u2", "r2"),
    *,
    tolerance: float = 1e-5,
    processes: bool = False,
    traced: TracedProgram | None = None,
    max_share: float | None = None,
    max_fallbacks: int | None = None,
) -> None:
    """Assert that the model divided over ranks computes what it computes alone; see `xdit_ir.checking.check`.

    Args:
        model: with real weights, in eval mode; `example`: its arguments, as for `xdit_ir.trace`.
        degrees: sets of degrees, in short (`"c2u2,r2"`) or as keyword arguments of `parallelize`.
        tolerance: largest accepted relative error.
        processes: also run what `emit` gives in one gloo process per rank (takes seconds); model and example must be
            picklable, and the test module importable. Of PipeFusion that is the first, synchronous step.
        traced: an earlier trace of the same model and example.
        max_share: largest part of a forward's FLOPs that the slowest rank may do; 0.5 is fair for two ranks.
        max_fallbacks: largest number of operators for which something may be gathered (`Report.fallbacks`).

    Raises:
        AssertionError: names every set that differs, with the first diverging node, or that is above a limit.
        XditError: the model cannot be captured, some degrees are illegal or a limit means nothing.
    """
    limits = Limits(max_share, max_fallbacks)
    traced = trace(model, example) if traced is None else traced
    problems = []
    for name, one in degree_sets(degrees).items():
        parallel = traced.parallelize(**one)
        problems += [f"{name}: {problem}" for problem in limits.exceeded(parallel.report())]
        result = check_parallel(parallel, model, example, tolerance=tolerance)
        if not result.ok:
            problems.append(f"{name}: {result}")
        elif processes:
            errors = run_processes(model, example, one)
            if not max(errors) <= tolerance:
                worst = errors.index(max(errors))
                problems.append(f"{name}: equal in simulation, but process {worst} differs by {errors[worst]:.2e}")
    if problems:
        raise AssertionError("\n".join(problems))


def degree_sets(degrees: Degrees | Iterable[Degrees]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `parallelize` by a printable name."""
    if isinstance(degrees, str):
        return {str(one): one.as_dict() for one in short.parse(degrees)}
    if isinstance(degrees, Mapping):
        return {",".join(f"{name}={value}" for name, value in degrees.items()): dict(degrees)}
    return {name: one for several in degrees for name, one in degree_sets(several).items()}


def degrees_of(world_size: int) -> list[str]:
    """All ways to spend this many ranks on `cfg` (at most 2), `ring` and `ulysses`, in short."""
    sizes = range(1, world_size + 1)
    every = (short.Degrees.of(cfg=c, ring=r, ulysses=u) for c in (1, 2) for r in sizes for u in sizes)
    return [str(one) for one in every if one.ranks == world_size]


def run_processes(model: nn.Module, example: Example, degrees: Mapping[str, Any], limit: float = 300) -> list[float]:
    """Emit and run the model in one gloo process per rank on this machine; the relative error of every rank's output.

    Of PipeFusion it runs the first step, which is synchronous and so exact.

    Raises:
        ParallelizeError: the degrees cannot be emitted.
        TimeoutError: some process did not end within `limit` seconds.
    """
    count = math.prod(degrees.get(name, 1) for name in MESH_DIMS)
    with torch.no_grad():
        args, kwargs = split_example(example)
        expected = tensors_of(model(*args, **kwargs))
    with tempfile.TemporaryDirectory() as folder:
        job = (count, folder, model, example, dict(degrees), torch.get_num_threads())
        context = spawn(_process, job, nprocs=count, join=False)  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + limit
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{count} processes did not end within {limit} s")
        return [relative_error(torch.load(Path(folder, str(rank))), expected) for rank in range(count)]


def _process(
    rank: int, count: int, folder: str, model: nn.Module, example: Example, degrees: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(max(1, threads // count))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    module = trace(model, example).parallelize(**degrees).emit(model)
    args, kwargs = split_example(example)
    with torch.no_grad():
        tensors = [materialize(tensor) for tensor in tensors_of(module(*args, **kwargs))]
    torch.save(tensors, Path(folder, str(rank)))
    dist.destroy_process_group()

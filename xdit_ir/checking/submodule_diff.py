"""Which submodule of a model first does not do what its program does, or not twice the same."""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from xdit_ir.api import ParallelProgram
from xdit_ir.capture.binder import bind_inputs
from xdit_ir.capture.effects import copied
from xdit_ir.capture.inputs import Example, split_example
from xdit_ir.checking.comparison import call_names
from xdit_ir.checking.divergence import Divergence, program_values
from xdit_ir.ir.difference import Difference, relative, tensors_of
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import Program, call_parts, where_of


@dataclass(frozen=True)
class Output:
    """What one call of a submodule returned."""

    path: str
    module: nn.Module
    tensors: tuple[torch.Tensor, ...]


def unrepeatable(model: nn.Module, example: Example, tolerance: float) -> Divergence | None:
    """The first submodule, by when it is done, that returns something else at a second forward with equal inputs."""
    pairs = zip(_outputs(model, example), _outputs(model, example), strict=False)
    for first, second in pairs:
        if first.path != second.path:
            caller = type(model.get_submodule(first.path.rpartition(".")[0]))
            problem = "a second forward with the same inputs does not call this"
            kind = type(first.module).__qualname__
            return Divergence(first.path, kind, _source(caller), None, float("inf"), problem=problem)
        for want, got in zip(first.tensors, second.tensors, strict=False):
            error = relative(got, want)
            if error > tolerance:
                problem = "a second forward with the same inputs gives something else: the first is expected below"
                return _divergence(first, error, problem, got, want)
    return None


def uncaptured(parallel: ParallelProgram, model: nn.Module, example: Example, tolerance: float) -> Divergence | None:
    """The first submodule, by when it is done, whose output the captured program computes nowhere."""
    program = parallel.original
    inputs = bind_inputs(model, program, *split_example(copied(example)))
    found = defaultdict(list)
    for value in program_values(program, model_state(program, model), inputs).values():
        for tensor in tensors_of(value):
            found[tensor.shape].append(tensor)
    known = _paths(program)
    for output in _outputs(model, example):
        if not any(path == output.path or path.startswith(f"{output.path}.") for path in known):
            continue  # nothing of it is used
        for want in output.tensors:
            nearest = min(((relative(x, want), x) for x in found[want.shape]), key=lambda pair: pair[0], default=None)
            if nearest is None or nearest[0] > tolerance:
                problem = "the captured program computes this nowhere; the nearest value it has is compared below"
                error, got = nearest or (float("inf"), want)
                return _divergence(output, error, problem, got, want)
    return None


def _divergence(output: Output, error: float, problem: str, got: torch.Tensor, want: torch.Tensor) -> Divergence:
    difference = Difference.of(got, want, Layout.whole(want.dim()), 0)
    kind = type(output.module)
    return Divergence(output.path, kind.__qualname__, _source(kind), None, error, difference, problem=problem)


def _outputs(model: nn.Module, example: Example) -> list[Output]:
    """What every call of a submodule returns in one forward, in the order in which they are done."""
    done: list[Output] = []
    handles = []
    for path, module in model.named_modules():

        def hook(module: nn.Module, args: object, output: object, path: str = path) -> None:
            tensors = [tensor.clone() for tensor in tensors_of(output)]
            done.append(Output(path, module, tuple(tensors)))

        handles.append(module.register_forward_hook(hook))
    try:
        args, kwargs = split_example(copied(example))
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return done


def _paths(program: Program) -> set[str]:
    """Paths of the modules that some operator of the program comes from; empty: the model itself."""
    prefixes = {call_parts(call)[0]: set[str]() for call in program.calls}
    for call in program.calls:
        prefixes[call_parts(call)[0]].add(call_parts(call)[1])
    found = {where_of(node).module for node in program.graph.nodes} | set(call_names(program).values())
    for name, block in program.blocks.items():
        for prefix in prefixes.get(name, ()):
            found |= {where_of(node).below(prefix) for node in block.graph.nodes}
    return found


def _source(kind: type[nn.Module]) -> str:
    """File and line of a class's forward."""
    try:
        lines, number = inspect.getsourcelines(kind.forward)
        return f"{os.path.basename(inspect.getfile(kind))}:{number}: {lines[0].strip()}"
    except (OSError, TypeError):
        return ""

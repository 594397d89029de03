"""Programs run on arguments as forward takes them; what they give is as forward gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from xdit_ir import capture
from xdit_ir.capture.inputs import Example, bind_example, split_example
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.program import Program
from xdit_ir.reflection.methods import Module, as_module
from xdit_ir.simulation.lockstep import RankObserver

Run = Callable[[Sequence[torch.Tensor], RankObserver | None], list[tuple[torch.Tensor, ...]]]
"""What every rank gives for the inputs of the next step."""


def run_examples(
    program: Program, model: nn.Module, examples: Sequence[Example], run: Run, observe: RankObserver | None = None
) -> list[list[Any]]:
    """The outputs of every rank by step, of which the last is observed; what forward writes into caches is written into
    the examples. The `program` says how arguments become inputs."""
    steps = []
    for example, see in zip(examples, _observers(examples, observe), strict=True):
        inputs = capture.bind_inputs(model, program, *split_example(example))
        with torch.no_grad():
            outputs = run(inputs, see)
        if program.signature.effects:
            capture.apply_effects(program.signature, outputs[0], bind_example(model, example), model)
        steps.append([capture.build_output(program.signature, tensors) for tensors in outputs])
    return steps


def run_single(program: Program, model: Module, example: Example) -> Any:
    """Interpret a program on one device."""
    model = as_module(model)
    state = model_state(program, model)

    def run(inputs: Sequence[torch.Tensor], _: RankObserver | None) -> list[tuple[torch.Tensor, ...]]:
        return [Interpreter(program, state, model_device(model, inputs)).run(inputs)]

    return run_examples(program, model, [example], run)[0][0]


def model_device(model: nn.Module, inputs: Sequence[torch.Tensor] = ()) -> torch.device:
    """Where a model is, or else its inputs."""
    for tensor in (*model.parameters(), *inputs):
        return tensor.device
    return torch.device("cpu")


def _observers(steps: Sequence[Any], observe: RankObserver | None) -> Iterable[RankObserver | None]:
    """For each step; only the last one is observed."""
    return (observe if place == len(steps) else None for place, _ in enumerate(steps, 1))

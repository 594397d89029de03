"""Helpers as fixtures: trace, run the program beside the module, compare bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from xdit_ir.capture import bind_inputs, build_output, trace
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.program import Program


def run_program(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The program's result for one call, with the model's weights, on the CPU."""
    tensors = bind_inputs(model, program, args, kwargs)
    with torch.no_grad():
        found = Interpreter(program, model_state(program, model), torch.device("cpu")).run(tensors)
    return build_output(program.signature, found)


def assert_same(found: Any, expected: Any) -> None:
    """Equal structure, types and bits."""
    assert type(found) is type(expected)
    found_leaves, found_spec = tree_flatten(found)
    expected_leaves, expected_spec = tree_flatten(expected)
    assert found_spec == expected_spec
    for left, right in zip(found_leaves, expected_leaves, strict=True):
        if isinstance(right, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left.nan_to_num(), right.nan_to_num())
        elif hasattr(right, "__dict__") and not isinstance(right, type):
            assert_same(vars(left), vars(right))
        else:
            assert left == right


def check_capture(model: nn.Module, example: Any, *others: Any) -> Program:
    """Trace with `example`; the program must agree with the module on it and on `others`."""
    program = trace(model, example)
    for call in (example, *others):
        args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
        found = run_program(program, model, *args, **kwargs)
        with torch.no_grad():
            assert_same(found, model(*args, **kwargs))
    return program


@pytest.fixture
def run() -> Callable[..., Any]:
    return run_program


@pytest.fixture
def check() -> Callable[..., Program]:
    return check_capture


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    return assert_same

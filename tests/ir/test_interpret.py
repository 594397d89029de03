"""Interpreters: a value lives until its last use, and observers see it before."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn

import xdit_ir as xir
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.simulation.lockstep import run_ranks

CPU = torch.device("cpu")


class Alive:
    """Observes a run; `most` values of operators were alive at once."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __call__(self, *arguments: Any) -> None:
        node, value = arguments[-2:]
        assert isinstance(node, fx.Node)
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            self.seen.append(weakref.ref(value))
            self.most = max(self.most, sum(one() is not None for one in self.seen))


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_are_let_go_of_behind_their_last_use(ranks: int) -> None:
    model, x, alive = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))), torch.ones(2, 4), Alive()
    program = xir.trace(model, (x,)).ir
    state = model_state(program, model)
    with torch.no_grad():
        outputs = run_ranks([program] * ranks, state, [x], CPU, alive)
        found = Interpreter(program, state, CPU, alive).run([x])
    assert len(alive.seen) >= 8 * (ranks + 1)
    assert all(torch.equal(output, model(x)) for (output,) in [*outputs, found])
    assert alive.most <= 2 * ranks + 1

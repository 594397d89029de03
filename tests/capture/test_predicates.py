"""Summaries of floating-point inputs that Python reads are guarded by what was read, not by the contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.capture import trace
from xdit_ir.errors import MismatchError, TraceError

Run = Callable[..., Any]


class Branches(nn.Module):
    """Adds the image only if there is one, and as many copies as it has positive rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if torch.all(image == torch.tensor(0.0)):
            return x
        return x + image * int((image.sum(-1) > 0).sum())


def test_guarded_by_the_value_read(run: Run, same: Run) -> None:
    model, x = Branches().eval(), torch.randn(3, 4)
    some, none = torch.rand(3, 4), torch.zeros(3, 4)
    with torch.no_grad():
        for image in (some, none):
            program = trace(model, (x, image))
            same(run(program, model, x * 2, image), model(x * 2, image))
        program = trace(model, (x, some))
        same(run(program, model, x, some + 1), model(x, some + 1))
    for other in (none, torch.cat([some[:1], -some[1:]])):
        with pytest.raises(MismatchError, match=r"^image: what was read of it while tracing \(test_predicates.py:"):
            run(program, model, x, other)


def test_written_input_is_looked_at_again(run: Run) -> None:
    model, x, image = Branches().eval(), torch.randn(3, 4), torch.rand(3, 4)
    program = trace(model, (x, image))
    run(program, model, x, image)
    image.zero_()
    with pytest.raises(MismatchError, match="image"):
        run(program, model, x, image)


def test_what_depends_on_weights_is_refused() -> None:
    class Depends(Branches):
        def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            return x if (self.linear(x) > 0).all() else image

    with pytest.raises(TraceError, match="the model's parameters"):
        trace(Depends().eval(), (torch.randn(3, 4), torch.rand(3, 4)))


def test_the_report_says_what_is_read_at_a_call() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return x + 1 if bool((condition == 0).all()) else x * 2

    example = {"x": torch.randn(2, 4), "condition": torch.zeros(3)}
    report = xir.trace(Branch(), example).parallelize().report()
    assert len(report.reads) == 1 and report.reads[0].startswith("condition: ")
    assert "waits for the device to read condition" in str(report)

"""What a pipeline on processes refuses, before it touches any."""

from __future__ import annotations

import pytest
import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.execution import Execution
from xdit_ir.pipelined.pipe_runner import check_pipeline


@pytest.mark.parametrize(
    ("execution", "reason"),
    [(Execution(transport="peer"), "transport")],
)
def test_refused_with_the_reason(execution: Execution, reason: str) -> None:
    program = xir.trace(*models.load("pixart-sigma:tiny")).ir
    check_pipeline(program, Execution(), torch.device("cpu"))
    with pytest.raises(xir.ParallelizeError, match=reason):
        check_pipeline(program, execution, torch.device("cpu"))

"""The static check of a pipeline's schedule: it passes what ends, and finds what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program, TensorSpec
from xdit_ir.pipefusion.pipeline_program import Pipeline
from xdit_ir.pipelined.schedule import plans_of, run_plans

MAPS = [(0, 1), (0, 1, 2, 3), (0, 1, 1, 0), (0, 1, 2, 2, 1, 0)]


def pipeline(coordinates: Sequence[int], patches: int) -> Pipeline:
    program = Program("", fx.Graph(), {}, None, {}, torch.device("cpu"), mesh=Mesh.of(pipefusion=patches))  # type: ignore[arg-type]
    return Pipeline(program, tuple(coordinates), 1)


def plans(coordinates: Sequence[int], patches: int, modes: Sequence[bool] = (True, False, False, True)) -> Any:
    return plans_of(pipeline(coordinates, patches), modes)


def message(stage: int, patch: int | None, *, sent: bool) -> tuple[TensorSpec, ...]:
    boundary = stage + sent
    return (TensorSpec((boundary, -1 if patch is None else patch), torch.float32),)


@pytest.mark.parametrize("ranks", MAPS)
@pytest.mark.parametrize("patches", [1, 2, 4, 7])
def test_nobody_waits_for_ever(ranks: Sequence[int], patches: int) -> None:
    run_plans(plans(ranks, patches), len(ranks), patches, message)


@pytest.mark.parametrize("ranks", MAPS)
def test_steps_overlap(ranks: Sequence[int]) -> None:
    """The first stage begins a step while the last patches of the one before are on their way."""
    entries = [entry for plan in plans(ranks, 5, (False, False)).values() for entry in plan]
    begins = next(item.issue_order for number, item in entries if number == 1 and item.stage == item.patch == 0)
    ends = max(item.issue_order for number, item in entries if number == 0)
    assert begins <= ends


def test_a_message_of_another_type_is_found() -> None:
    def other(stage: int, patch: int | None, *, sent: bool) -> tuple[TensorSpec, ...]:
        return () if (stage, patch, sent) == (1, 2, False) else message(stage, patch, sent=sent)

    with pytest.raises(VerifyError, match="stage 1, patch 2: expects"):
        run_plans(plans((0, 1), 4), 2, 4, other)


def test_patches_in_another_order_are_found() -> None:
    wrong: Any = plans((0, 1), 4)
    wrong[1][1], wrong[1][2] = wrong[1][2], wrong[1][1]
    with pytest.raises(VerifyError, match="rank 1, stage 1"):
        run_plans(wrong, 2, 4, message)


def test_waiting_for_ever_is_found() -> None:
    wrong: Any = plans((0, 1, 1, 0), 2)
    wrong[0].insert(0, wrong[0].pop(1))  # stage 3 before stage 0
    with pytest.raises(VerifyError, match="rank 0 before"):
        run_plans(wrong, 4, 2, message)


def test_a_message_that_nobody_wants_is_found() -> None:
    wrong: Any = plans((0, 1), 2)
    wrong[1].pop()
    with pytest.raises(VerifyError, match="left over"):
        run_plans(wrong, 2, 2, message)

"""The static check of a pipeline's schedule: it passes what ends, and finds what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from xdit_ir.errors import VerifyError
from xdit_ir.program import TensorSpec
from xdit_ir.runtime.schedule import Item, Schedule, run_plans

Plan = list[tuple[int, Item]]
FOLDS = [(0, 1), (0, 1, 2), (0, 1, 1, 0), (0, 1, 0, 1), (0, 1, 2, 2, 1, 0), (0, 1, 2, 0, 1, 2)]


def plans(ranks: Sequence[int], patches: int, modes: Sequence[bool] = (True, False, False, True)) -> dict[int, Plan]:
    schedule, found = Schedule(len(ranks), patches), {}
    for rank in set(ranks):
        mine = [stage for stage, owner in enumerate(ranks) if owner == rank]
        entries = [
            (number, item)
            for number, (start, synchronous) in enumerate(zip(schedule.starts(modes), modes, strict=True))
            for item in schedule.items(start, mine, synchronous=synchronous)
        ]
        found[rank] = sorted(entries, key=lambda entry: entry[1].key)
    return found


def message(stage: int, patch: int | None, *, sent: bool) -> tuple[TensorSpec, ...]:
    boundary = stage + sent
    return (TensorSpec((boundary, -1 if patch is None else patch), torch.float32),)


@pytest.mark.parametrize("ranks", FOLDS)
@pytest.mark.parametrize("patches", [1, 2, 4, 7])
def test_nobody_waits_for_ever(ranks: Sequence[int], patches: int) -> None:
    run_plans(plans(ranks, patches), len(ranks), patches, message)


@pytest.mark.parametrize("ranks", FOLDS)
def test_steps_overlap(ranks: Sequence[int]) -> None:
    """The first stage begins a step while the last patches of the one before are on their way."""
    entries = [entry for plan in plans(ranks, 5, (False, False)).values() for entry in plan]
    begins = next(item.slot for number, item in entries if number == 1 and item.stage == item.patch == 0)
    ends = max(item.slot for number, item in entries if number == 0)
    assert begins <= ends
    taken = [(rank, item.slot, item.stage) for rank, plan in plans(ranks, 5).items() for _, item in plan]
    assert len(taken) == len(set(taken)), "a stage is wanted once at a time"


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
    wrong[0].insert(0, wrong[0].pop(1))
    with pytest.raises(VerifyError, match="rank 0 before"):
        run_plans(wrong, 4, 2, message)


def test_a_message_that_nobody_wants_is_found() -> None:
    wrong: Any = plans((0, 1), 2)
    wrong[1].pop()
    with pytest.raises(VerifyError, match="left over"):
        run_plans(wrong, 2, 2, message)

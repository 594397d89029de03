"""What the option `cache` may say."""

from __future__ import annotations

import pytest

from xdit_ir.caching.decision import BranchMemory
from xdit_ir.caching.rule import CacheRule
from xdit_ir.errors import ParallelizeError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("first-blok:0.1", "did you mean 'first-block'"),
        ("first-block", "'' is no legal value of 'first-block'"),
        ("first-block:-1", "'-1' is no legal value"),
        ("timestep:nan", "'nan' is no legal value"),
        ("every:0", "'0' is no legal value"),
        ("steps:1/0", "'1/0' is no legal value"),
        ("steps:1,x", "'1,x' is no legal value"),
        ("", "expected one of the forms 'first-block:0.08'"),
        (0.08, "cache=0.08: expected one of the forms"),
    ],
)
def test_what_is_no_rule_is_refused(given: object, said: str) -> None:
    with pytest.raises(ParallelizeError, match=said):
        CacheRule.parse(given)


def computed(rule: str, steps: int) -> list[int]:
    memory, found = BranchMemory(), []
    for step in range(steps):
        if not memory.skips(CacheRule.parse(rule), [], []):
            memory.kept = ()
            found.append(step)
    return found


def test_schedules_name_the_steps_that_compute() -> None:
    assert computed("every:3", 8) == [0, 3, 6]
    assert computed("steps:0,1/4", 8) == [0, 1, 4, 5]
    assert computed("steps:2,3,6", 8) == [0, 2, 3, 6], "the first step has nothing to reuse"


def test_what_does_not_change_at_all_is_no_reason_to_reuse() -> None:
    rule, memory = CacheRule.parse("first-block:0.5"), BranchMemory(kept=())
    same, little, much = (0.0, 0.0, 1.0), (0.0, 0.4, 1.0), (0.0, 0.6, 1.0)
    assert [memory.skips(rule, [], [change]) for change in (same, little, much)] == [False, True, False]
    assert not memory.skips(rule, [], [little, (1.0, 0.0, 0.0)]), "a rank has nothing to compare with"

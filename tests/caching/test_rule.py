"""What the option `cache` may say."""

from __future__ import annotations

import pytest
import torch

from xdit_ir.caching.decision import BranchMemory
from xdit_ir.caching.kept import Taylor
from xdit_ir.caching.rule import CacheRule, Group, Watched
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
        if not memory.reused(CacheRule.parse(rule), [], []):
            memory.kept = ()
            found.append(step)
    return found


def test_schedules_name_the_steps_that_compute() -> None:
    assert computed("every:3", 8) == [0, 3, 6]
    assert computed("steps:0,1/4", 8) == [0, 1, 4, 5]
    assert computed("steps:2,3,6", 8) == [0, 2, 3, 6], "the first step has nothing to reuse"


def test_a_first_block_that_changes_little_or_not_at_all_is_a_reason_to_reuse() -> None:
    """As for diffusers' first block cache, of which 0 / 0 exceeds no threshold either."""
    rule, memory = CacheRule.parse("first-block:0.5"), BranchMemory(kept=())
    same, little, much = (0.0, 0.0, 1.0), (0.0, 0.4, 1.0), (0.0, 0.6, 1.0)
    nothing, something = (0.0, 0.0, 0.0), (0.0, 0.1, 0.0)
    changes = (same, little, much, nothing, something)
    assert [bool(memory.reused(rule, [], [change])) for change in changes] == [True, True, False, True, False]
    assert not memory.reused(rule, [], [little, (1.0, 0.0, 0.0)]), "a rank has nothing to compare with"


def test_features_of_a_timestep_that_were_zero_say_nothing() -> None:
    rule, memory = CacheRule.parse("timestep:0.5"), BranchMemory(kept=())
    assert not memory.reused(rule, [], [(0.0, 0.0, 0.0)])


def test_groups_of_the_same_steps_are_reused_together() -> None:
    def odd(step: int) -> bool:
        return step % 2 == 1

    def third(step: int) -> bool:
        return step % 3 == 2

    rule = CacheRule("modules", Watched.NOTHING, groups=(Group(odd), Group(third), Group(odd)))
    assert rule.variants == (frozenset(), {0, 2}, {1}, {0, 1, 2})
    assert [set(rule.reused(step)) for step in range(6)] == [set(), {0, 2}, {1}, {0, 2}, set(), {0, 1, 2}]


def test_a_series_of_differences_goes_on() -> None:
    """A polynomial of its order is met exactly; before there are that many values, a shorter series is taken."""
    series = Taylor(2)
    for step in (0, 1, 2, 4):
        series.keep(torch.tensor([float(step)]), step)
    assert series.reuse(7).item() == 7 and series.reuse(5).item() == 5
    series = Taylor(2, torch.bfloat16)
    series.keep(torch.tensor([3.0]), 0)
    assert series.reuse(2).item() == 3 and series.reuse(2).dtype == torch.float32

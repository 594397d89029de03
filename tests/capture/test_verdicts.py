"""What was found of the contents of tensors is not found out again."""

from __future__ import annotations

import torch

from xdit_ir.capture.binder import Verdicts


def away() -> torch.Tensor:
    """A tensor that is not on the CPU."""
    return torch.zeros(2, device="meta")


def test_tensors_that_come_in_turn_are_looked_at_once_each() -> None:
    verdicts, asked = Verdicts(), list[torch.Tensor]()

    def right(one: torch.Tensor) -> bool:
        return verdicts.of("mask", [one], lambda: asked.append(one) is None and one is long)

    long, short = away(), away()
    assert [right(one) for one in (long, short, long, short)] == [True, False, True, False]
    assert len(asked) == 2


def test_what_was_written_to_is_looked_at_again() -> None:
    verdicts, one = Verdicts(), away()
    assert verdicts.of("mask", [one], lambda: True)
    one.add_(1)
    assert not verdicts.of("mask", [one], lambda: False)
    assert not verdicts.of("another", [one], lambda: False)


def test_tensors_on_the_cpu_are_always_looked_at() -> None:
    verdicts, one = Verdicts(), torch.zeros(2)
    assert verdicts.of("mask", [one], lambda: True) and not verdicts.of("mask", [one], lambda: False)

"""What ranks hold is compared by a few numbers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xdit_ir.errors import MismatchError
from xdit_ir.transport.contents import Contents
from xdit_ir.transport.handshake import _compare_contents

LATENTS = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
OTHER = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
DRIFTED = (LATENTS.float() + 5e-3 * OTHER.float()).bfloat16()
SIGMA = torch.tensor([0.5])


def compare(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rounding: float = 0.0) -> None:
    """As rank 0 of two does."""
    here, there = Contents(mine, rounding=rounding), Contents(theirs, rounding=rounding)
    line: Any = SimpleNamespace(rank=0, agreed=lambda error: error)
    _compare_contents(line, here, [here.numbers(), there.numbers()], agreed=True)


def test_equal_contents_pass_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare({"x": LATENTS}, {"x": LATENTS.clone()}, rounding=3e-2)


def test_tensors_without_elements() -> None:
    for shape in ((0,), (0, 4), (3, 0, 4), (2, 0)):
        compare({"x": torch.zeros(shape)}, {"x": torch.zeros(shape)})


def test_what_kernels_of_another_order_change_is_told_where_code_is_compiled() -> None:
    with pytest.warns(UserWarning, match="what compiled kernels round.*x: its contents differ"):
        compare({"x": LATENTS}, {"x": DRIFTED}, rounding=3e-2)
    with pytest.raises(MismatchError, match="x: its contents differ"):
        compare({"x": LATENTS}, {"x": DRIFTED})


def test_other_latents_and_other_timesteps_are_no_rounding() -> None:
    with pytest.raises(MismatchError, match="x: its contents differ"):
        compare({"x": LATENTS}, {"x": OTHER}, rounding=3e-2)
    with pytest.raises(MismatchError, match="t: its contents differ"):
        compare({"x": LATENTS, "t": SIGMA}, {"x": LATENTS, "t": SIGMA + 1e-3}, rounding=3e-2)

"""What ranks hold is compared by a few numbers."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_ir.errors import MismatchError
from xdit_ir.transport import contents as contents_of
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


def test_tables_of_a_model_may_be_on_the_host_and_its_weights_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: copied.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(contents_of, "_projections", lambda x: x.new_empty(4, dtype=torch.float64))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    with FakeTensorMode():
        given = {"table": torch.ones(4), "weight": torch.ones(4, device="cuda"), "other": torch.ones(8)}
        contents = Contents(given)
    assert contents.names == [*given] and not contents.ready
    assert copied == [torch.device("cuda", 0)]


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

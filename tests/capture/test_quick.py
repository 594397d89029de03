"""Results of frequent operators whose types are told without running them: as a run on fake tensors gives them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_ir.capture.quick import quick_shape

aten = torch.ops.aten


def layouts(*shape: int) -> list[torch.Tensor]:
    """A tensor, and some of its shape that lie in memory otherwise, are empty or of another type."""
    turned = torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
    sliced = torch.empty(*shape[:-1], shape[-1] + 1)[..., 1:]
    return [torch.empty(shape), turned, sliced, torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape).bool()]


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    *((aten.linear.default, call) for call in itertools.product(layouts(2, 5, 4), layouts(3, 4), [None])),
    *((aten.linear.default, call) for call in itertools.product(layouts(5, 4)[:4], layouts(3, 4)[:2], layouts(3)[:4])),
    *((aten.linear.default, (x, torch.empty(3, 4))) for x in (torch.empty(4), torch.empty(0, 4), torch.empty(2, 5))),
    *((aten.layer_norm.default, (x, [4], None, None, 1e-6)) for x in layouts(2, 5, 4)),
    *((aten.layer_norm.default, (torch.empty(2, 5, 4), [5, 4], *w)) for w in ([], layouts(5, 4)[:1] * 2)),
    *((aten.rms_norm.default, call) for call in itertools.product(layouts(2, 5, 4)[:4], [[4]], layouts(4)[:4])),
    *((aten.rms_norm.default, (torch.empty(2, 5, 4), [5], None)),),
]


@torch.inference_mode()
def test_it_is_what_fake_tensors_give_or_nothing() -> None:
    told = 0
    for func, args in CALLS:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            shape = quick_shape(func, fakes, {})
            if shape is None:
                continue
            result = func(*fakes)
            told += 1
        want = torch.empty(shape, dtype=fakes[0].dtype, device="meta")
        assert (result.shape, result.stride(), result.dtype) == (want.shape, want.stride(), want.dtype), (func, args)
    assert told > 8


def test_what_would_be_refused_is_not_told() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        x, weight = torch.empty(2, 5), torch.empty(3, 4)
        assert quick_shape(aten.linear.default, (x, weight), {}) is None
        aten.linear.default(x, weight)

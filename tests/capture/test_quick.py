"""Results of frequent operators whose types are told without running them: as a run on fake tensors gives them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_ir.capture.quick import quick_result
from xdit_ir.capture.values import storage_id

aten = torch.ops.aten


def layouts(*shape: int) -> list[torch.Tensor]:
    """A tensor, and some of its shape that lie in memory otherwise, are empty or of another type."""
    turned = torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
    sliced = torch.empty(*shape[:-1], shape[-1] + 1)[..., 1:]
    return [torch.empty(shape), turned, sliced, torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape).bool()]


def images() -> torch.Tensor:
    """Some whose channels lie side by side."""
    return torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)


OPERANDS: list[tuple[Any, Any]] = [
    (aten.mul.Tensor, 0.5),
    (aten.add.Tensor, torch.empty(1, 3, 4, 6, 8)[..., 1]),
    (aten.add.Tensor, torch.empty(1, 3, 4, 6)),
]
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    *((aten.linear.default, call) for call in itertools.product(layouts(2, 5, 4), layouts(3, 4), [None])),
    *((aten.linear.default, call) for call in itertools.product(layouts(5, 4)[:4], layouts(3, 4)[:2], layouts(3)[:4])),
    *((aten.linear.default, (x, torch.empty(3, 4))) for x in (torch.empty(4), torch.empty(0, 4), torch.empty(2, 5))),
    *((aten.layer_norm.default, (x, [4], None, None, 1e-6)) for x in layouts(2, 5, 4)),
    *((aten.layer_norm.default, (torch.empty(2, 5, 4), [5, 4], *w)) for w in ([], layouts(5, 4)[:1] * 2)),
    *((aten.rms_norm.default, call) for call in itertools.product(layouts(2, 5, 4)[:4], [[4]], layouts(4)[:4])),
    *((aten.rms_norm.default, (torch.empty(2, 5, 4), [5], None)),),
    *((aten.mul.Tensor, (x, factor)) for x in layouts(2, 5, 4) + layouts(1, 5, 4) for factor in (2, 0.5, 1j, True)),
    *(
        (op, call)
        for op in (aten.mul.Tensor, aten.add.Tensor)
        for call in itertools.product(layouts(2, 5, 4), repeat=2)
    ),
    *((aten.add.Tensor, (x[:, :, 1], x[:, 1, None, :5])) for x in layouts(2, 5, 6)),
    *((aten.mul.Tensor, (x[:, :, 1], x[:, :, 2])) for x in layouts(2, 5, 6)),
    *((aten.mul.Tensor, (torch.empty(5, 1, 4).expand(5, 3, 4), 2.0)), (aten.mul.Tensor, (torch.empty(0, 4), 2.0))),
    *((aten.mul.Tensor, (images()[:, :, row], 2.0)) for row in (0, 3)),
    *((aten.mul.Tensor, (images()[:1, :, :, row], 2.0)) for row in (0, 3)),
    *((aten.mul.Tensor, (x, 2.0)) for x in (images(), images()[:1], images()[:, :1], images()[:, :, :1])),
    *((aten.add.Tensor, (x, y[:, :, 1])) for x in (images()[:, :, 0], torch.empty(2, 3, 5)) for y in (images(),)),
    *((op, (x[:, :, :, row], y)) for x in (torch.empty(1, 3, 4, 5, 6),) for row in (0, 3) for op, y in OPERANDS),
    *((op, (x[..., row], y)) for x in (torch.empty(1, 3, 4, 6, 5),) for row in (0, 3) for op, y in OPERANDS),
    *((aten.select.int, (x, dim, index)) for x in layouts(2, 5, 4) for dim in (0, 1, -1) for index in (0, 1, -1)),
    *((aten.slice.Tensor, (x, *how)) for x in layouts(2, 5, 4) for how in ([1], [2, 1], [-2, -3, -1], [1, 1, 99, 2])),
    *((aten.slice.Tensor, (torch.empty(2, 5)[:, 1:], *how)) for how in ([], [1, 3, 1], [0, -9, 1])),
]


@torch.inference_mode()
def test_it_is_what_fake_tensors_give_or_nothing() -> None:
    told: list[Any] = []
    for func, args in CALLS:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            quick = quick_result(func, fakes, {})
            if quick is None:
                continue
            result = func(*fakes)
            told.append(func)
        assert _described(quick, fakes[0]) == _described(result, fakes[0]), (func, args)
    assert min(map(told.count, {func for func, _ in CALLS})) > 3


def _described(x: torch.Tensor, source: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype, storage_id(x) == storage_id(source)


def test_what_would_be_refused_is_not_told() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        x, weight = torch.empty(2, 5), torch.empty(3, 4)
        assert quick_result(aten.linear.default, (x, weight), {}) is None
        aten.linear.default(x, weight)
    with FakeTensorMode():  # some versions of PyTorch refuse it, others take any index
        assert quick_result(aten.select.int, (torch.empty(2, 5), 1, 5), {}) is None

"""Results of frequent operators whose types are told without running them: as a run on fake tensors gives them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_ir.capture.fast_fakes import quick_result
from xdit_ir.reflection.tensors import map_tensors, storage_id, tensors_in

aten = torch.ops.aten


def layouts(*shape: int) -> list[torch.Tensor]:
    """A tensor, and some of its shape that lie in memory otherwise, are empty or of another type."""
    turned = torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
    sliced = torch.empty(*shape[:-1], shape[-1] + 1)[..., 1:]
    return [torch.empty(shape), turned, sliced, torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape).bool()]


def images() -> torch.Tensor:
    """Some whose channels lie side by side."""
    return torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)


def pictures() -> list[torch.Tensor]:
    """Images and videos in every order that PyTorch has, of one channel or one row too, and parts of them."""
    video = torch.empty(2, 4, 3, 6, 5)
    orders = [video, video.to(memory_format=torch.channels_last_3d), video.permute(0, 1, 3, 4, 2)]
    image = torch.empty(2, 4, 6, 5)
    orders += [image, image.to(memory_format=torch.channels_last), image[..., 1:], image.bfloat16(), image.double()]
    return [*orders, *(x[:1] for x in orders), *(x[:, :1] for x in orders), *(x[:, :, :1] for x in orders)]


def convolved(x: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    weight = torch.empty(8, x.shape[1], 1, *[2] * (x.ndim - 3), dtype=x.dtype)
    return {4: aten.conv2d.default, 5: aten.conv3d.default}[x.ndim], (x, weight)


def enlarged(x: torch.Tensor) -> list[tuple[Any, tuple[Any, ...]]]:
    twice, over = [2.0] * (x.ndim - 2), {4: aten.upsample_nearest2d.vec, 5: aten.upsample_nearest3d.vec}[x.ndim]
    exact = [(aten._upsample_nearest_exact2d.vec, (x, None, twice))] if x.ndim == 4 else []
    return [(over, (x, None, twice)), *exact]


OF_PICTURES: list[tuple[Any, Any]] = [
    (aten.group_norm.default, (1, None, None, 1e-6)),
    (aten.linalg_vector_norm.default, (2, [1], True)),
    (aten.pad.default, ([1, 1, 0, 0], "constant", None)),
    (aten.pad.default, ([1, 1], "replicate", None)),
    (aten.pad.default, ([0, 0], "constant", None)),
    (aten.constant_pad_nd.default, ([1, 1, 0, 2], 0.0)),
    *((one, ()) for one in (aten.silu.default, aten.gelu.default, aten.clone.default, aten._to_copy.default)),
    *((one, (2.0,)) for one in (aten.clamp_min.default, aten.div.Tensor, aten.sub.Tensor)),
    (aten.unsqueeze.default, (0,)),
    (aten.unsqueeze.default, (-1,)),
    (aten.unsqueeze.default, (9,)),
    (aten.transpose.int, (1, -1)),
    (aten.transpose.int, (1, 8)),
    (aten.permute.default, ([0, -1, 2, 1],)),
    (aten.permute.default, ([0, 4, 2, 1, -2],)),
    (aten.view.default, ([-1, 5],)),
    (aten.view.default, ([30, 4],)),
    (aten.reshape.default, ([1, 4, 30],)),
    (aten.reshape.default, ([1, 4, 6, 3, 5],)),
    (aten.expand.default, ([3, 4, 6, 5],)),
    (aten.expand.default, ([-1, 4, 7, -1],)),
    (aten.expand.default, ([-1, 4, 3, 6, 5],)),
    (aten.expand.default, ([2, 2, 4, 6, 5],)),
]
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
    *((op, (x, *rest)) for op, rest in OF_PICTURES for x in pictures()),
    *((aten.cat.default, ([x, y], 1)) for x in pictures()[::3] for y in pictures()[::2] if x.shape == y.shape),
    *((aten.div.Tensor, (x, y)) for x in pictures()[::2] for y in pictures() if x.shape == y.shape),
    *((aten.add.Tensor, (x, x[:1, :, :1])) for x in pictures()),
    *((aten.mul.Tensor, (x, torch.empty(4, *[1] * (x.ndim - 2)))) for x in pictures()),
    *((aten.mul.Tensor, (torch.empty(x.ndim - 2, *[1] * (x.ndim - 2)), x)) for x in pictures()),
    *map(convolved, pictures()),
    *itertools.chain(*map(enlarged, pictures())),
    *((aten.conv1d.default, (torch.empty(size, 4, 6), torch.empty(8, 4, 3))) for size in range(6)),
    *((up, (torch.empty(size, 4, 6), [12], None)) for size in range(6) for up in (aten.upsample_nearest1d.vec,)),
    *((aten._upsample_nearest_exact1d.vec, (torch.empty(size, 4, 6), [12], None)) for size in range(6)),
    *((aten.slice.Tensor, (torch.empty(2, 5)[:, 1:], *how)) for how in ([], [1, 3, 1], [0, -9, 1])),
]


@torch.inference_mode()
def test_it_is_what_fake_tensors_give_or_nothing() -> None:
    told: list[Any] = []
    with FakeTensorMode() as mode:
        mode.cache_enabled = False  # it forgets which results are views
        for func, args in CALLS:
            fakes: list[Any] = map_tensors(list(args), mode.from_tensor)
            quick = quick_result(func, fakes, {})
            if quick is None:
                continue
            result, first = func(*fakes), tensors_in(fakes)[0]
            told.append(func)
            assert _described(quick, first) == _described(result, first), (func, args)
    assert min(map(told.count, {func for func, _ in CALLS})) > 1


def _described(x: torch.Tensor, source: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype, storage_id(x) == storage_id(source)


def test_what_would_be_refused_is_not_told() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        x, weight = torch.empty(2, 5), torch.empty(3, 4)
        assert quick_result(aten.linear.default, (x, weight), {}) is None
        aten.linear.default(x, weight)
    with FakeTensorMode():  # some versions of PyTorch refuse it, others take any index
        assert quick_result(aten.select.int, (torch.empty(2, 5), 1, 5), {}) is None

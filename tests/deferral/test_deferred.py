"""Deferred results through unmodified schedulers: nothing is computed early, and parts are parts of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

from xdit_ir.deferral.deferred import Deferred, descents_of, is_separable, materialize, materialize_slice, pending
from xdit_ir.deferral.descent import Numbered
from xdit_ir.errors import MismatchError

SHAPE = (2, 4, 8, 6)
ROWS = 2  # the dimension of which patches are ranges


class Model:
    """Pointwise, so that the output for some rows follows from these rows; notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def exact(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.7 * x + 0.01 * t)

    def deferred(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        model = self

        class Rows:
            def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
                model.asked.append((dim, start, stop))
                return model.exact(materialize_slice(x, dim, start, stop), t)

            def whole(self) -> torch.Tensor:
                model.asked.append((-1, 0, 0))
                return model.exact(materialize(x), t)

        return pending(Rows(), x.shape, x.dtype, x.device)


def schedulers() -> list[Any]:
    return [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++"),
        diffusers.UniPCMultistepScheduler(),
        diffusers.DDIMScheduler(clip_sample=False),
        diffusers.EulerAncestralDiscreteScheduler(),
    ]


def denoise(scheduler: Any, model: Callable[..., torch.Tensor], steps: int = 6) -> torch.Tensor:
    """A loop with guidance, as pipelines write it."""
    make = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    latents = torch.randn(SHAPE, generator=make) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        both = torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):
            both = scheduler.scale_model_input(both, t)
        without, with_text = model(both, t).chunk(2)
        noise = without + 3.0 * (with_text - without)
        extra = {} if isinstance(scheduler, NO_GENERATOR) else {"generator": make}
        latents = scheduler.step(noise, t, latents, **extra, return_dict=False)[0]
    return latents


NO_GENERATOR = (diffusers.UniPCMultistepScheduler,)


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda scheduler: type(scheduler).__name__)
@torch.no_grad()
def test_a_loop_computes_nothing_until_rows_are_asked_for(scheduler: Any) -> None:
    model = Model()
    want = denoise(scheduler, model.exact)
    got = denoise(type(scheduler).from_config(scheduler.config), model.deferred)
    assert isinstance(got, Deferred) and not model.asked
    assert is_separable(got, ROWS, 0, 4)
    top = materialize_slice(got, ROWS, 0, 4)
    assert set(model.asked) == {(ROWS, 0, 4)}, "other rows were not needed"
    torch.testing.assert_close(top, want[:, :, :4])
    torch.testing.assert_close(materialize_slice(got, ROWS, 4, 8), want[:, :, 4:])
    asked = len(model.asked)
    torch.testing.assert_close(materialize(got), want)
    assert len(model.asked) == asked == 12, "each part once a step"


@dataclass
class Whole:
    value: torch.Tensor

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.value.narrow(dim, start, stop - start)

    def whole(self) -> torch.Tensor:
        return self.value


def rows(value: torch.Tensor) -> torch.Tensor:
    return pending(Whole(value), value.shape, value.dtype, value.device)


@pytest.fixture
def value() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


OPERATORS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.flip(2) + 1,
    lambda x: x.roll(1, 2) * 2,
    lambda x: x.permute(0, 2, 3, 1).reshape(2, 48, 4),
    lambda x: x.flatten(2).transpose(1, 2),
    lambda x: (x * torch.arange(6.0)).sum(-1),
    lambda x: torch.stack([x, -x], 1)[:, 1],
    lambda x: x[:, :, 2:6] + x[:, :1, 2:6],
    lambda x: torch.einsum("k,bkhw->bhw", torch.arange(4.0), x),
    lambda x: x.mean((2, 3), keepdim=True) + x,
    lambda x: torch.where(x > 0, x, x.exp()),
    lambda x: x.unsqueeze(1).expand(2, 3, 4, 8, 6).contiguous().view(6, 4, 8, 6),
    lambda x: torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * x.double(),
    lambda x: torch.nn.functional.conv2d(x, torch.ones(1, 4, 3, 3), padding=1),
    lambda x: x.softmax(2),
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_parts_are_parts_of_the_whole_whatever_is_done(
    operator: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor
) -> None:
    want = operator(value)
    for dim in range(want.dim()):
        half = max(1, want.shape[dim] // 2)
        got = operator(rows(value))
        torch.testing.assert_close(materialize_slice(got, dim, 0, half), want.narrow(dim, 0, half))
    torch.testing.assert_close(materialize(operator(rows(value))), want)


def test_what_mixes_rows_needs_more_than_some_of_them(value: torch.Tensor) -> None:
    assert not isinstance(rows(value).flip(2), Deferred)
    assert not is_separable(rows(value)[:, :, 1:6:2], ROWS, 0, 2)
    assert is_separable(torch.cat([rows(value), rows(value)], 1), ROWS, 0, 4)


CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "slice": lambda x: x[:, :, 2:7],
    "slice-from-behind": lambda x: x[:, :, -6:] * 2,
    "split": lambda x: x.split([3, 1, 4], 2)[2] + x.chunk(2, 2)[1],
    "cat": lambda x: torch.cat([torch.ones(2, 4, 3, 6), x[:, :, 5:], x, x[:, :, :1]], 2),
    "cat-of-a-part": lambda x: torch.cat([x, -x], 2)[:, :, 6:13],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_what_cuts_and_joins_rows_needs_the_rows_that_it_moves(
    cut: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor
) -> None:
    want = cut(value)
    for start, stop in itertools.combinations(range(want.shape[2] + 1), 2):
        got = cut(rows(value))
        assert is_separable(got, ROWS, start, stop)
        torch.testing.assert_close(materialize_slice(got, ROWS, start, stop), want[:, :, start:stop])


def test_rows_are_followed_to_where_they_were(value: torch.Tensor) -> None:
    """What is behind a text in an output, joined to a reference that is not of it; of a roll, no one shift is."""
    maker = object()
    made = pending(Whole(value), value.shape, value.dtype, value.device, (maker, Numbered(0)))
    target = made[:, :, 3:] * 2
    roll = torch.cat([made[:, :, 4:], made[:, :, :4]], 2)
    latents = {"target": target, "joined": torch.cat([torch.ones(2, 4, 2, 6), target], 2), "roll": roll}
    followed = {name: one.dims[2] for name, one in descents_of(maker, latents).items()}
    assert followed == {"target": (2, 3), "joined": (2, 1), "roll": None}


def test_writes_in_place(value: torch.Tensor) -> None:
    x, y = value.clone(), rows(value.clone())
    before = y * 1
    for z in (x, y):
        z.mul_(2).add_(torch.ones(()))
    assert isinstance(y, Deferred)
    torch.testing.assert_close(materialize(y), x)
    torch.testing.assert_close(materialize(before), value)
    for z in (x, y):
        head = z[:, :, :2]
        head += 1
        z[:, 0].zero_()
        head *= 3
    torch.testing.assert_close(materialize(y), x)


def test_reading_by_any_means(value: torch.Tensor) -> None:
    assert rows(value)[0, 0, 0, 0].item() == value[0, 0, 0, 0].item()
    assert rows(value).numpy().sum() == value.numpy().sum()
    assert rows(value)[0, 0, 0].tolist() == value[0, 0, 0].tolist()
    assert bool((rows(value) == value).all())
    plain = torch.zeros(SHAPE)
    plain.copy_(rows(value))
    assert torch.equal(plain, value)


def test_printing_reads_nothing(value: torch.Tensor) -> None:
    model = Model()
    text = repr(model.deferred(value, torch.zeros(())))
    assert text == "Deferred([2, 4, 8, 6], dtype=torch.float32, device=cpu)" and not model.asked


def test_small_operands_may_be_reused_and_writes_to_large_ones_are_noticed(value: torch.Tensor) -> None:
    sigma = torch.tensor(2.0)
    scaled = rows(value) * sigma
    sigma.fill_(5.0)
    torch.testing.assert_close(materialize(scaled), value * 2)
    noise = torch.randn(64, 64)
    total = rows(torch.ones(64, 64)) + noise
    noise.zero_()
    with pytest.raises(MismatchError, match=r"\[64, 64\] was written to"):
        materialize(total)


@pytest.mark.parametrize("mode", ["autocast", "inference"])
def test_the_readers_mode_does_not_matter(mode: str, value: torch.Tensor) -> None:
    got = rows(value) * 2 + 1
    context = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else torch.inference_mode()
    with context:
        inside = rows(value) * 3
        plain = materialize(got)
    torch.testing.assert_close(plain, value * 2 + 1)
    torch.testing.assert_close(materialize(inside), value * 3)

"""Which call is the next step, which another call of the same step, and which begins a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch

from xdit_ir.deferral.deferred import Deferred, pending
from xdit_ir.deferral.descent import Numbered
from xdit_ir.ir.partition import Indices
from xdit_ir.pipefusion.patch_cut import PatchCut
from xdit_ir.pipelined.requests import AGAIN, NEW, NEXT, CallPosition, Requests

ROWS = 1
SHAPE = (2, 8, 3)


class Module:
    """Decides like a pipeline, computes nothing; `owner` stands for a specialisation."""

    def __init__(self, warmup: int = 1) -> None:
        self.requests, self.warmup, self.owner = Requests(), warmup, "one"
        self.cut = PatchCut(ROWS, (Indices.range(0, 4), Indices.range(4, 8)))
        self.positions: list[CallPosition] = []

    def __call__(self, x: torch.Tensor) -> Deferred:
        return self.of_list([x])[0]

    def of_list(self, samples: Sequence[torch.Tensor]) -> list[Deferred]:
        """One output a sample."""
        latents = {f"x_{number}": x for number, x in enumerate(samples)}
        cuts = dict.fromkeys(latents, self.cut)
        position = self.requests.position(latents, cuts, self.owner, self.warmup)
        self.requests.enter(position, latents, self.owner)
        self.requests.number += 1
        self.positions.append(position)
        value = torch.zeros(SHAPE)

        class Source:
            def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
                return value.narrow(dim, start, stop - start)

            def whole(self) -> torch.Tensor:
                return value

        number = self.requests.number
        outputs = [
            pending(Source(), SHAPE, torch.float32, torch.device("cpu"), (self.requests, Numbered(number, place)))
            for place in range(len(samples))
        ]
        self.requests.returned(number, outputs)
        return outputs

    @property
    def kinds(self) -> list[str]:
        return [position.kind for position in self.positions]


@pytest.fixture
def module() -> Module:
    return Module()


def test_steps_of_one_call(module: Module) -> None:
    x: Any = torch.ones(SHAPE)
    for _ in range(3):
        x = x - 0.1 * module(x)
    assert module.kinds == [NEW, NEXT, NEXT]
    assert [position.synchronous for position in module.positions] == [True, False, False]


def test_steps_of_two_calls_with_the_output_cast_and_read(module: Module) -> None:
    x: Any = torch.ones(SHAPE)
    for step in range(3):
        one = module(x).float()
        if step == 1:
            x.sum().item()
        if step == 2:
            one.sum().item()  # by one rank alone, say: it changes nothing
        two = module(x).double().float()
        x = x - 0.1 * (one + 2 * (two - one))
    assert module.kinds == [NEW, AGAIN, NEXT, AGAIN, NEXT, AGAIN]
    assert [position.place for position in module.positions] == [0, 1] * 3
    assert [position.synchronous for position in module.positions] == [True, True, *[False] * 4]


@pytest.mark.parametrize(("shift", "kinds"), [(2, [NEW, NEXT, NEXT]), (0, [NEW, NEW, NEW])])
def test_rows_of_the_latents_are_where_the_output_has_them(module: Module, shift: int, kinds: list[str]) -> None:
    """The output has a text of two rows in front of them; a reference that is joined to them is of no output."""
    module.cut = PatchCut(ROWS, (Indices.range(0, 3), Indices.range(3, 6)), shift)
    reference, x = torch.ones(2, 1, 3), torch.ones(2, 5, 3)
    for _ in range(3):
        output = module(torch.cat([reference, x], ROWS))
        x = x - 0.1 * output[:, -5:]
    assert module.kinds == kinds


def test_a_call_that_is_left_out_warms_up_again(module: Module) -> None:
    x: Any = torch.ones(SHAPE)
    for step in range(4):
        outputs = [module(x) for _ in range(1 if step == 1 else 2)]
        x = x + sum(outputs)
    late = [position.synchronous for position in module.positions if position.place == 1]
    assert late == [True, True, False]


def test_equal_latents_in_other_memory_are_the_same(module: Module) -> None:
    x = torch.ones(SHAPE)
    one, two = module(x.clone()), module(x.clone())
    three = module(x + 1)
    assert module.kinds == [NEW, AGAIN, NEW] and one.shape == two.shape == three.shape


def test_an_output_that_is_thrown_away_is_no_part_of_a_pair(module: Module) -> None:
    x = torch.ones(SHAPE)
    for _ in range(3):
        module(x)
    assert module.kinds == [NEW] * 3


def test_latents_written_to_are_others(module: Module) -> None:
    x = torch.ones(SHAPE)
    held = [module(x)]
    x += 1
    held.append(module(x))
    assert module.kinds == [NEW, NEW]


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.flip(ROWS),
        lambda y: y.roll(1, ROWS),
        lambda y: y[:, [1, 0, 2, 3, 4, 5, 6, 7]],
        lambda y: y.mean(ROWS, keepdim=True) + torch.ones(SHAPE),
        lambda y: torch.cat([y[:, 4:], y[:, :4]], ROWS),
        lambda y: torch.tensor(y.tolist()),
        lambda y: y[:, :1] + torch.ones(SHAPE),
    ],
)
def test_other_positions_begin_a_request(module: Module, change: Any) -> None:
    x: Any = torch.ones(SHAPE)
    module(x + change(module(x)))
    assert module.kinds == [NEW, NEW]


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda y: torch.cat([y, y])[:2],
        lambda y: y.clamp(-1, 1),
        lambda y: y.reshape(2, 8, 3, 1).squeeze(-1),
        lambda y: torch.stack([y, 2 * y]).unbind(0)[1],
    ],
)
def test_the_same_positions_are_the_next_step(module: Module, change: Any) -> None:
    x: Any = torch.ones(SHAPE)
    module(x + change(module(x)))
    assert module.kinds == [NEW, NEXT]


def test_an_older_output_begins_a_request(module: Module) -> None:
    x: Any = torch.ones(SHAPE)
    first = module(x)
    module(x + first)
    module(x + 2 * first)
    second = module(x + 3 * first)
    assert module.kinds == [NEW, NEXT, NEW, NEW] and second.shape == SHAPE


def test_another_specialisation_warms_up(module: Module) -> None:
    x: Any = torch.ones(SHAPE)
    x = x + module(x)
    module.owner = "two"
    x = x + module(x)
    x = x + module(x)
    assert module.kinds == [NEW, NEXT, NEXT]
    assert [position.synchronous for position in module.positions] == [True, True, False]


def test_outputs_of_another_module_are_foreign(module: Module) -> None:
    other, x = Module(), torch.ones(SHAPE)
    module(x + module(x + other(x)))
    module(x + other(x))
    assert module.kinds == [NEW, NEXT, NEW]


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: torch.stack([x[1], x[0]]),
        lambda x: torch.stack(list(reversed(x.unbind(0)))),
        lambda x: torch.cat(list(reversed(x.chunk(2)))),
        lambda x: torch.cat([x[:1], x[:1]]),
    ],
)
def test_samples_that_change_places_begin_a_request(module: Module, change: Any) -> None:
    x: Any = torch.ones(SHAPE)
    x = x - 0.1 * module(x)
    module(change(x))
    assert module.kinds == [NEW, NEW]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda one, two: [one, two], NEXT),
        (lambda one, two: [two, one], NEW),
        (lambda one, two: [one, one + 0], NEW),
    ],
)
def test_samples_of_a_list_that_change_places_begin_a_request(module: Module, change: Any, kind: str) -> None:
    x: list[Any] = [torch.ones(SHAPE), torch.zeros(SHAPE)]
    x = [a - 0.1 * b for a, b in zip(x, module.of_list(x), strict=True)]
    module.of_list(change(*x))
    assert module.kinds == [NEW, kind]


@pytest.mark.parametrize(
    "step",
    [
        lambda x, out: torch.cat([x.chunk(2)[0] - out.chunk(2)[0] + 2 * (out.chunk(2)[1] - out.chunk(2)[0])] * 2),
        lambda x, out: torch.stack([a - b for a, b in zip(x.unbind(0), out.unbind(0), strict=True)]),
        lambda x, out: (x.unsqueeze(0) - out.unsqueeze(0)).squeeze(0),
        lambda x, out: torch.cat([x[:1] - out[:1], x[1:] - out[1:]]),
        lambda x, out: x - out.view(2, 8, 1, 3).permute(3, 1, 2, 0).permute(3, 1, 2, 0).reshape(SHAPE),
    ],
)
def test_samples_in_their_places_are_the_next_step(module: Module, step: Any) -> None:
    """Guidance by a doubled batch, lists of samples, and other ways to write the same."""
    x: Any = torch.ones(SHAPE)
    for _ in range(3):
        x = step(x, module(x))
    assert module.kinds == [NEW, NEXT, NEXT]


def test_guidance_of_one_sample_with_a_multistep_scheduler(module: Module) -> None:
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(5)
    x: Any = torch.ones(1, *SHAPE[1:])
    for time in scheduler.timesteps:
        without, with_text = module(torch.cat([x] * 2)).chunk(2)
        x = scheduler.step(without + 3 * (with_text - without), time, x, return_dict=False)[0]
    assert module.kinds == [NEW, *[NEXT] * 4]

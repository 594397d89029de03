"""Which call goes on with what: by what its inputs were made of, and by the text that it is for."""

from __future__ import annotations

from typing import Any

import torch

from xdit_ir.caching.decision import BranchMemory
from xdit_ir.runtime.denoising import Denoising

CONDITION, EMPTY = torch.ones(1, 4, 8), torch.zeros(1, 4, 8)


class Pipeline:
    """Calls a module that gives back something of its latents."""

    def __init__(self) -> None:
        self.denoising, self.time = Denoising(), 1.0

    def call(self, latents: torch.Tensor, text: torch.Tensor, owner: object = "program", **more: Any) -> Any:
        inputs = {"latents": latents, "text": text, "time": torch.tensor([self.time]), **more}
        memory = self.denoising.enter(inputs, owner)
        [result] = self.denoising.returned([torch.as_tensor(latents).clone()])
        return result, memory

    def step(self, latents: torch.Tensor, *texts: torch.Tensor) -> tuple[torch.Tensor, list[BranchMemory]]:
        made = [self.call(latents, text) for text in texts]
        self.time -= 0.1
        return latents - 0.1 * sum(result for result, _ in made), [memory for _, memory in made]


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(seed))


def test_each_branch_goes_on_with_its_own_and_a_new_request_with_none() -> None:
    pipe = Pipeline()
    x, first = pipe.step(noise(), EMPTY, CONDITION)
    x, second = pipe.step(x, EMPTY, CONDITION)
    assert first == second and first[0] is not first[1]
    _, third = pipe.step(noise(1), EMPTY, CONDITION)
    assert not {*map(id, third)} & {*map(id, first)}


def test_a_request_that_was_given_up_leaves_nothing_though_its_results_are_held() -> None:
    pipe = Pipeline()
    held, first = pipe.step(noise(), CONDITION)  # a traceback holds it, say
    x, second = pipe.step(noise(1), CONDITION)
    _, third = pipe.step(x, CONDITION)
    assert third == second != first, held


def test_texts_that_are_made_anew_in_every_step_are_compared() -> None:
    pipe = Pipeline()
    x, first = pipe.step(noise(), EMPTY.clone(), CONDITION.clone())
    _, second = pipe.step(x, EMPTY.clone(), CONDITION.clone())
    assert second == first


def test_guidance_that_ends_leaves_the_other_branch_its_own() -> None:
    pipe = Pipeline()
    x, first = pipe.step(noise(), EMPTY, CONDITION)
    x, second = pipe.step(x, EMPTY, CONDITION)
    _, third = pipe.step(x, CONDITION)
    assert third == second[1:] == first[1:]


def test_guidance_that_begins_late_goes_on_with_nothing() -> None:
    pipe = Pipeline()
    x, first = pipe.step(noise(), CONDITION)
    x, second = pipe.step(x, EMPTY, CONDITION)
    assert second[1] is first[0] and second[0] is not first[0]
    _, third = pipe.step(x, EMPTY, CONDITION)
    assert third == second


def test_another_program_goes_on_with_nothing() -> None:
    pipe = Pipeline()
    result, first = pipe.call(noise(), CONDITION, owner="one shape")
    _, second = pipe.call(noise() - result, CONDITION, owner="another shape")
    assert first is not second


def test_what_left_pytorch_is_a_new_request() -> None:
    pipe = Pipeline()
    x, first = pipe.step(noise(), CONDITION)
    _, second = pipe.step(torch.from_numpy(x.numpy()), CONDITION)
    assert first != second


def test_a_condition_that_changes_in_every_step_is_found_out() -> None:
    """Noise that is drawn anew for a reference image: from the third step on it is known to change."""
    pipe, x, found = Pipeline(), noise(), []
    for step in range(4):
        result, memory = pipe.call(x, CONDITION, reference=noise(step)[None])
        x = x - result
        found.append(memory)
    assert found[1] is not found[0] and found[1] is found[2] is found[3]


def test_a_second_model_takes_over_the_latents_of_the_first() -> None:
    pipe, later = Pipeline(), Pipeline()
    x, _ = pipe.step(noise(), EMPTY, CONDITION)
    x, first = later.step(x, EMPTY, CONDITION)
    _, second = later.step(x, EMPTY, CONDITION)
    assert first == second and first[0] is not first[1]

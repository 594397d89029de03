"""What ranks run, made from the programs of patches and stages, is still the model: in this thread, by `run_steps`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import PipelinedProgram
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.pipefusion.rank_tasks import RankTasks

FRAMES = 4


class Frames(nn.Module):
    """Attention over frames, each with its row of a table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 2 * FRAMES, size))
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.qkv(x + self.table[:, : x.shape[1]])).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class Video(nn.Module):
    """Latents of all frames of all samples, one behind the other: a patch has some frames of each sample."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, size), nn.Linear(size, 8)
        self.blocks = nn.ModuleList(Frames(size) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.into(x.reshape(-1, FRAMES, 8))
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens).reshape(x.shape) + x


def case(samples: int) -> tuple[nn.Module, tuple[torch.Tensor], PipelinedProgram]:
    torch.manual_seed(0)
    model, example = Video().eval(), (torch.randn(FRAMES * samples, 8),)
    parallel: Any = xir.trace(model, example).parallelize(pipefusion=2)
    return model, example, parallel


@pytest.mark.parametrize("samples", [2, 70])
def test_each_patch_has_its_own_rows_of_tables_and_of_samples(samples: int) -> None:
    """In steps that are synchronous, too, in which one program runs all patches; the places of so many rows as 70
    samples have are constants of the program, which are other ones for each patch."""
    model, example, parallel = case(samples)
    with torch.no_grad():
        want = tensors_of(model(*example))
    for step in parallel.run_steps(model, [example] * 3):
        assert max(relative_error(tensors_of(output), want) for output in step) <= 1e-5


def test_patches_of_several_runs_are_passed_on_one_by_one() -> None:
    _, _, parallel = case(samples=2)
    tasks = RankTasks(parallel.pipeline, rank=0)
    [cut] = tasks.cuts
    assert cut is not None and [part.runs for part in cut.parts] == [((0, 2), (4, 2)), ((2, 2), (6, 2))]
    assert tasks.latents == {"x": cut}
    assert [need.patches for task in tasks.displaced.values() for need in task.needs] == [(0,), (1,)]


@pytest.mark.parametrize(
    "degrees", [{"patches": 1}, {"patches": 3, "ulysses": 2}, {"cfg": 2}, {"stages": [1, 1, 1, 1]}]
)
def test_all_ranks_run_what_is_simulated(degrees: dict[str, Any]) -> None:
    """Displaced steps with other latents, too, which are not the model's."""
    model, example = models.load("flux.1-dev:tiny")
    parallel: Any = xir.trace(model, example).parallelize(pipefusion=2, **degrees)
    steps = [example | {"hidden_states": example["hidden_states"] * factor} for factor in (1, 0.9, 0.8)]
    for got, want in zip(parallel.run_steps(model, steps), parallel.simulate_steps(model, steps), strict=True):
        for rank, output in enumerate(got):
            assert relative_error(tensors_of(output), tensors_of(want[rank])) <= 1e-5

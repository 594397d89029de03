"""What cannot be divided is refused with the nearest choice that can."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir import models
from xdit_ir.api import TracedProgram, trace
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh


@pytest.mark.parametrize(
    ("degrees", "hint"),
    [
        ({"ulyses": 2}, r"did you mean ulysses=2\?"),
        ({"rings": 4}, r"did you mean ring=4\?"),
        ({"experts": 2}, "there are cfg, pipefusion, ring, ulysses, tensor"),
        ({"ring": 0}, "nearest legal one is ring=1"),
    ],
)
def test_degrees(degrees: dict[str, int], hint: str) -> None:
    with pytest.raises(ParallelizeError, match=hint):
        Mesh.of(**degrees)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        x = x + places[:, None]
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def traced() -> TracedProgram:
    """Two samples of 24 tokens, and a table of their places."""
    found = trace(Model(), (torch.ones(2, 24, 8), torch.ones(24)))
    assert found.analysed.tokens
    return found


@pytest.mark.parametrize(
    ("degrees", "hint"),
    [
        ({"ulysses": 10**6}, "24 at most; nearest legal: ulysses=24"),
        ({"ring": 10**23}, "nearest legal: ring=24"),
        ({"ulysses": 25}, "nearest legal: ulysses=24"),
        ({"ulysses": 5, "ring": 5}, "nearest legal: ring=4 x ulysses=5"),
        ({"ulysses": 100, "ring": 100}, "nearest legal: ring=24"),
        ({"cfg": 10**6}, "a batch of 2.*or use cfg=2"),
        ({"cfg": 24}, "a batch of 2.*or use cfg=2"),
        ({"cfg": 2, "ulysses": 10**6}, "nearest legal: ulysses=24"),
        ({"cfg": 10**6, "pair_calls": True}, "as many calls of a step at once, .* use at most cfg=8"),
        ({"pipefusion": 10**6}, "use at most pipefusion="),
        ({"pipefusion": 2, "ulysses": 10**6}, "nearest legal: ulysses=24"),
        ({"pipefusion": 2, "patches": 10**6}, "use at most 24"),
    ],
)
def test_more_ranks_than_there_is_to_divide_are_refused_at_once(
    traced: TracedProgram, degrees: dict[str, Any], hint: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(ParallelizeError, match=hint):
        traced.parallelize(**degrees)
    assert time.perf_counter() - start < 1


def test_a_refused_number_of_patches_names_the_nearest_that_works() -> None:
    """The output is cut in rows of pixels, of which there are 16."""
    with pytest.raises(ParallelizeError, match=r"patches=17 cannot .*; use patches=16$"):
        trace(*models.load("kind-finite-only:tiny")).parallelize(pipefusion=2, patches=17)


def test_it_is_the_largest_of_smaller_numbers_where_some_between_them_are_refused_too() -> None:
    """Of 5, 4 and 2 patches of whole frames and rows, 3 are refused like 5."""
    traced = trace(*models.load("consisid:tiny"))
    for patches, nearest in ((5, 4), (3, 2)):
        with pytest.raises(ParallelizeError, match=f"patches={patches} cannot .*; use patches={nearest}$"):
            traced.parallelize(pipefusion=2, patches=patches)

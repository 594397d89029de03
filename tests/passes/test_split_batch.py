"""What `split-batch` does, and says, where there is no batch to divide."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.passes.packed import told_apart
from xdit_ir.simulation.examples import run_single


@pytest.mark.parametrize("degrees", [{"cfg": 2}, {"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}])
def test_packed_samples_are_cut_between_samples(degrees: dict[str, int]) -> None:
    model, example = models.load("plain-packed-dit:tiny")
    traced = xir.trace(model, example)
    report = traced.parallelize(**degrees).report()
    assert max(report.flops_per_rank) <= 1.1 * report.flops_total / len(report.flops_per_rank)
    inside = [one for one in report.collectives if one.mesh_dim == "cfg" and one.count > 2]
    assert not inside, "attention of one sample needs nothing of the other"
    assert xir.check(model, example, traced=traced, **degrees).ok


@pytest.mark.parametrize("name", ["kind-packed-lengths", "kind-packed-text", "kind-packed-joint"])
def test_lengths_that_python_reads_tell_samples_apart(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    traced = xir.trace(model, example)
    for degrees in ({"cfg": 2}, {"cfg": 2, "ulysses": 2}):
        report = traced.parallelize(**degrees).report()
        assert max(report.flops_per_rank) <= 0.55 * report.flops_total
        assert xir.check(model, example, traced=traced, **degrees).ok


class TwoSequences(nn.Module):
    """Queries of one sequence, keys of another, and which see which."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask.tolist()

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, torch.tensor(self.mask))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["1100", "1100", "0011"], True),
        (["1000", "0110", "0001"], True),
        (["1100", "0110", "0011"], False),  # one key is seen by two
        (["1100", "0010", "0010"], False),  # one is seen by nobody
        (["1111", "1111", "0000"], False),  # one sees nothing
        (["0011", "0011", "1100"], False),  # keys in another order
        (["1111", "1111", "1111"], False),  # all are one sample's
    ],
)
def test_masks_of_samples(rows: list[str], told: bool) -> None:
    mask = torch.tensor([[int(one) for one in row] for row in rows], dtype=torch.bool)
    model, example = TwoSequences(mask), {"q": torch.randn(1, 2, 3, 8), "k": torch.randn(1, 2, 4, 8)}
    analysed = xir.trace(model, example).analysed
    apart = told_apart(analysed)
    assert (apart is not None) == told
    if apart is not None:
        torch.testing.assert_close(run_single(apart, model, example), model(**example))


def test_more_halves_than_packed_samples() -> None:
    traced = xir.trace(*models.load("plain-packed-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"batch of 2: give at least 3 samples"):
        traced.parallelize(cfg=3)


def test_too_few_samples() -> None:
    traced = xir.trace(*models.load("plain-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"batch of 2: give at least 3 samples .* or use cfg=2"):
        traced.parallelize(cfg=3)


class Layers(nn.Module):
    """The stream is the input itself, with nothing before the first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("degrees", [{"cfg": 2, "ulysses": 2}, {"cfg": 2, "ring": 2}])
def test_an_input_that_is_the_stream_is_cut_along_both(degrees: dict[str, int]) -> None:
    model, example = Layers(), (torch.randn(2, 16, 32),)
    report = xir.trace(model, example).parallelize(**degrees).report()
    assert max(report.flops_per_rank) <= 0.26 * report.flops_total
    assert xir.check(model, example, **degrees).ok


class Joined(nn.Module):
    """The samples make one sequence, and each attends to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.qkv, self.out = nn.Linear(1, 32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv((x + self.time(t[:, None])[:, None]).flatten(0, 1)).unflatten(-1, (3, 4, 8)).unbind(1)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)).view_as(x)


def test_samples_that_attend_to_each_other_are_not_cut_apart() -> None:
    traced = xir.trace(Joined().eval(), {"x": torch.randn(2, 12, 32), "t": torch.rand(2)})
    with pytest.raises(xir.ParallelizeError, match=r"packed into one sequence.*use cfg=1"):
        traced.parallelize(cfg=2)

"""One halo for several windows: equal to the module whatever is merged, with fewer exchanges and little more work."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.checking.check import check_parallel
from xdit_ir.ir import ops
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.merge_halos import MergeHalos
from xdit_ir.passes.order import mesh_passes

CHAINS, ALL_CHAINS = 9, 90
ANY = 1e9  # more work that ranks may do


class Residual(nn.Module):
    """Two windows beside the value itself, with a norm over all rows or of each place between them."""

    def __init__(self, width: int, kernel: int, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, kernel, padding=kernel // 2) for _ in range(2))
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape [batch, width, rows, columns]."""
        return x + self.second(F.silu(self.norm(self.first(F.silu(x)))))


class Channels(nn.Module):
    """A norm of each place for itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape [batch, width, rows, columns]."""
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5


def chain(seed: int, width: int = 8) -> tuple[nn.Module, int]:
    """Windows of several kinds at random, and a number of rows that they may have."""
    draw = random.Random(seed)

    def layers() -> Iterator[nn.Module]:
        for _ in range(draw.randint(3, 6)):
            kernel = draw.choice([3, 3, 5])
            norm = draw.choice([nn.GroupNorm(2, width), Channels(), nn.Identity()])
            yield draw.choice(
                [
                    nn.Conv2d(width, width, kernel, padding=kernel // 2),
                    nn.Conv2d(width, width, kernel, stride=2, padding=kernel // 2),
                    nn.Upsample(scale_factor=2),
                    nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(width, width, 3)),
                    nn.AvgPool2d(3, 1, 1),
                    Residual(width, kernel, norm),
                    Residual(width, kernel, norm),
                ]
            )
            yield nn.SiLU()

    torch.manual_seed(seed)
    return nn.Sequential(*layers()).eval(), draw.choice([24, 37, 48, 50])


def divided(traced: TracedProgram, ranks: int, growth: float | None) -> ParallelProgram:
    """Under `ulysses`, with so much more work allowed; None: halos as they are."""
    mesh, passes = Mesh.of(ulysses=ranks), list[object]()
    for one in mesh_passes(mesh):
        if not isinstance(one, MergeHalos):
            passes.append(one)
        elif growth is not None:
            passes.append(replace(one, growth=growth))
    return ParallelProgram(traced.ir, traced.analysed, run_passes(traced.analysed, passes), mesh)  # type: ignore[arg-type]


def halos(parallel: ParallelProgram) -> int:
    """How often ranks exchange them in a forward."""
    found = ((graph, times) for _, graph, times in all_graphs(parallel.ir))
    return sum(times * len(graph.find_nodes(op="call_function", target=ops.halo_exchange)) for graph, times in found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(ALL_CHAINS if metafunc.config.getoption("--zoo-all") else CHAINS))


def test_any_chain_of_windows_is_equal(seed: int) -> None:
    module, rows = chain(seed)
    example, ranks = (torch.randn(1, 8, rows, 6),), 2 + seed % 3
    traced = xir.trace(module, example)
    before = divided(traced, ranks, None)
    for growth in (ANY, 0.1):
        parallel = divided(traced, ranks, growth)
        result = check_parallel(parallel, module, example)
        assert result.ok, f"{ranks} ranks, {rows} rows, {growth}: {result}\n{module}"
        assert halos(parallel) <= halos(before)
    assert parallel.report().share <= 1.1 * before.report().share


@pytest.mark.parametrize(("layers", "left"), [(1, 0), (2, 0), (4, 0)])
def test_what_every_rank_has_needs_no_halo(layers: int, left: int) -> None:
    module = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)))
    assert halos(divided(xir.trace(module, (torch.randn(1, 4, 64, 8),)), 2, ANY)) == left


def test_norms_over_all_rows_count_those_of_a_rank_only() -> None:
    """Halos are merged across them, one a block: what is normalised is wider than what statistics are taken of."""
    module = nn.Sequential(*(Residual(8, 3, nn.GroupNorm(2, 8)) for _ in range(3))).eval()
    example = (torch.randn(1, 8, 40, 6),)
    traced = xir.trace(module, example)
    before, after = (divided(traced, 2, growth) for growth in (None, ANY))
    assert (halos(before), halos(after)) == (6, 3)
    assert check_parallel(after, module, example).ok


class Frames(nn.Module):
    """Frames one by one, each of which finds what the one before kept of two convolutions' operands."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(width, width, (2, 3, 3), padding=(0, 1, 1)) for _ in range(4))

    def step(self, x: torch.Tensor, kept: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One frame [batch, width, 1, rows, columns], and what it keeps."""
        new = []
        for conv, before in zip(self.convs, kept, strict=True):
            new.append(x.clone())
            x = F.silu(conv(torch.cat([before, x], 2)))
        return x, new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [batch, width, frames, rows, columns]."""
        frame = F.softmax(x, -1)  # of which each rank makes its own rows
        kept, made = [torch.zeros_like(x[:, :, :1])] * len(self.convs), []
        for at in range(x.shape[2]):
            result, kept = self.step(frame[:, :, at : at + 1], kept)
            made.append(result)
        return torch.cat(made, 2)


def test_caches_of_frames_are_as_wide_as_they_are_used() -> None:
    module, example = Frames().eval(), (torch.randn(1, 8, 4, 48, 6),)
    traced = xir.trace(module, example)
    before, after = (divided(traced, 3, growth) for growth in (None, ANY))
    assert halos(after) * 4 <= halos(before)
    assert check_parallel(after, module, example).ok


class Block(nn.Module):
    """Attention over tokens, and two convolutions over their image."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.depth, self.mix = (nn.Conv2d(width, width, 3, padding=1, groups=g) for g in (width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same shape [batch, width, rows, columns]."""
        tokens = x.flatten(2).mT
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = (tokens + mixed).mT.unflatten(-1, x.shape[-2:])
        return x + self.mix(F.silu(self.depth(x)))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_blocks_with_several_convolutions(ranks: int) -> None:
    """A denoiser with convolutions in every block: their halos are one, and the work stays divided."""
    module = nn.Sequential(*(Block() for _ in range(4))).eval()
    example = (torch.randn(1, 32, 24, 8),)
    traced = xir.trace(module, example)
    before, after, wide = (divided(traced, ranks, growth) for growth in (None, 0.02, ANY))
    assert halos(wide) < halos(before) == 8
    assert after.report().share <= 1.02 * before.report().share
    assert after.report().share <= 0.30 or ranks < 4
    for parallel in (after, wide):
        assert check_parallel(parallel, module, example).ok


class TokenShift(nn.Module):
    """Each token is mixed with the one before it: what is padded in front is dropped behind."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            before = F.pad(x.sin(), (0, 0, 1, -1))
            x = x + layer(x + before) * layer(x - before).cumsum(1)
        return x


@pytest.mark.parametrize("ulysses", [3, 4])
def test_what_is_dropped_at_an_end_stays_on_a_rank(ulysses: int) -> None:
    assert xir.check(TokenShift().eval(), (torch.randn(1, 64, 32),), ulysses=ulysses).ok

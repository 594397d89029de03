"""Tiles of decoders and encoders, and samples that are decoded one by one, are shared out over ranks: each does whole
tiles with no exchange inside, all have the result, and it is the tiled one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoders import kl, wan

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.checking.check import check_parallel

# A method, an example, and the sizes of what can be shared out.
Case = tuple[Any, dict[str, Any], list[float]]


def kl_tiles() -> Case:
    """Three rows of two; those of the last row and of the second column are four latents high, or wide."""
    vae = kl().eval()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 16
    return vae.decode, {"z": torch.randn(1, 4, 28, 16)}, [256, 256, 64, 64, 64, 16]


def kl_encoder() -> Case:
    method, *_ = kl_tiles()
    return method.__self__.encode, {"x": torch.randn(1, 3, 128, 64)}, [64, 64, 32, 16, 16, 8]


def kl_slices() -> Case:
    vae = kl().eval()
    vae.enable_slicing()
    return vae.decode, {"z": torch.randn(3, 4, 12, 10)}, [1, 1, 1]


def wan_tiles() -> Case:
    """Tiles of two frames each, of which the second needs what the first has left in caches."""
    vae = wan().eval()
    vae.enable_tiling(32, 32, 24, 24)
    return vae.decode, {"z": torch.randn(1, 4, 2, 10, 4)}, [80, 60, 40, 30]


def hunyuan_tiles() -> Case:
    """Tiles in time, too: of five frames and of two."""
    method, _ = models.load_part("hunyuan-video", "decode")
    vae: Any = method.__self__  # type: ignore[attr-defined]
    high, long = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    vae.enable_tiling(8 * high, 8 * high, 4 * long, 6 * high, 6 * high, 3 * long)
    return (
        vae.decode,
        {"z": torch.randn(1, 4, 5, 14, 8)},
        [320, 320, 80, 128, 128, 32],
    )


CASES = {make.__name__: make for make in (kl_tiles, kl_encoder, kl_slices, wan_tiles, hunyuan_tiles)}
IN_CI = {"kl_tiles": [3], "kl_slices": [2]}


def slowest(sizes: list[float], ranks: int) -> float:
    """The part of the work of the slowest rank, if the next largest is given to who has least."""
    loads = [0.0] * ranks
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads) / sum(sizes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES if metafunc.config.getoption("--zoo-all") else IN_CI)


def test_ranks_compute_whole_tiles(case: str, pytestconfig: pytest.Config) -> None:
    torch.manual_seed(0)
    method, example, sizes = CASES[case]()
    traced = xir.trace(method, example)
    for ranks in (2, 3, 4) if pytestconfig.getoption("--zoo-all") else IN_CI[case]:
        parallel = traced.parallelize(ulysses=ranks)
        report = parallel.report()
        assert report.share <= slowest(sizes, ranks) + 0.02, str(report)
        assert sum(report.flops_per_rank) <= 1.01 * report.flops_total, "no rank repeats what another does"
        assert {one.kind for one in report.collectives} == {"gather"} and not report.fallbacks, str(report)
        result = check_parallel(parallel, method, example)
        assert result.ok, f"{ranks} ranks: {result}"


def test_a_rank_has_the_calls_of_its_tiles_only() -> None:
    method, example, _ = kl_slices()
    parallel = xir.trace(method, example).parallelize(ulysses=2)
    assert [len(list(parallel.rank(rank).calls)) for rank in range(2)] == [2, 1]

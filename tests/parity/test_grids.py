"""Images over a grid of ranks: rows over one mesh dim and columns over another, where that costs less than rows alone.

`--zoo-all` runs every autoencoder that has rows and columns, at sizes that no side of a grid divides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_decoders import kl, tiny

import xdit_ir as xir
from xdit_ir import Machine, models
from xdit_ir.api import ParallelProgram
from xdit_ir.checking.check import check_parallel
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT
from xdit_ir.porting.grid import in_a_grid
from xdit_ir.sharding.report import Report

SLOW = Machine(bytes=1e7)
GRIDS = ({"ring": 2, "ulysses": 2}, {"ring": 3, "ulysses": 2}, {"ring": 2, "ulysses": 4})
# Rows and columns of latents, where the zoo's are 32 rows.
ROWS, COLUMNS = 14, 13
# What draws noise, each rank its own when all are simulated in one process; and encoders and decoders of square images.
LEFT_OUT = {("consistency", "decode"), ("rae", "encode"), ("rae", "decode")}


def is_in_a_grid(parallel: ParallelProgram) -> bool:
    """Whether rows and columns of some value are divided over different mesh dims."""
    nodes = (node for _, graph, _ in all_graphs(parallel.ir) for node in graph.nodes)
    layouts = (one for node in nodes if isinstance(one := node.meta.get(LAYOUT), Layout))
    spaces = (layout.dims[-2:] for layout in layouts if len(layout.dims) in (4, 5))
    return any(None not in dims for dims in spaces)


def halos(report: Report) -> int:
    """Bytes that the busiest rank sends to its neighbours."""
    return sum(one.bytes_per_rank for one in report.collectives if one.kind == "halo_exchange")


def exchanges(report: Report) -> int:
    return sum(one.count for one in report.collectives)


def test_a_square_image_sends_less_in_as_many_exchanges() -> None:
    """Four in a row: two rows of 16; in a grid: half a row, half a column and a corner."""
    traced = xir.trace(tiny().eval().decoder, (torch.randn(1, 4, 16, 16),))
    row, grid = (traced.parallelize(machine=SLOW, **one) for one in ({"ulysses": 4}, GRIDS[0]))
    assert not is_in_a_grid(row) and is_in_a_grid(grid)
    before, after = row.report(), grid.report()
    assert max(before.share, after.share) <= 0.25 * 1.02  # rows at the edges of parts may be computed twice
    assert exchanges(after) <= exchanges(before)
    assert halos(after) <= 0.55 * halos(before)


def test_rows_alone_where_halos_cost_less_than_putting_them_together() -> None:
    traced = xir.trace(tiny().eval().decoder, (torch.randn(1, 4, 16, 16),))
    parallel = traced.parallelize(machine=Machine(bytes=1e12), **GRIDS[0])
    assert not is_in_a_grid(parallel)
    assert halos(parallel.report()) == halos(traced.parallelize(ulysses=4).report())


@pytest.mark.parametrize("degrees", GRIDS, ids=str)
def test_uneven_rows_and_columns_are_exact(degrees: dict[str, int], pytestconfig: pytest.Config) -> None:
    """Group norms over both, attention in the middle, rows that are repeated."""
    if degrees != GRIDS[0] and not pytestconfig.getoption("--zoo-all"):
        pytest.skip("as with four ranks (--zoo-all)")
    torch.manual_seed(0)
    decoder, example = kl().eval().decoder, (torch.randn(1, 4, 10, 9),)
    traced = xir.trace(decoder, example)
    parallel, row = (
        traced.parallelize(machine=SLOW, **degrees),
        traced.parallelize(ulysses=Mesh.of(**degrees).world_size),
    )
    assert is_in_a_grid(parallel)
    assert not parallel.report().fallbacks
    assert parallel.report().share < row.report().share
    result = check_parallel(parallel, decoder, example)
    assert result.ok, result


def test_a_port_over_all_ranks_takes_a_grid_where_that_costs_less() -> None:
    """Whatever the degrees of the denoiser are: as square as the number of ranks allows; a prime number is no grid."""
    analysed = xir.trace(tiny().eval().decoder, (torch.randn(1, 4, 24, 24),)).analysed
    sides = {3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4)}
    for ranks, (ring, ulysses) in sides.items():
        found = in_a_grid(analysed, Mesh.of(ulysses=ranks), SLOW)
        assert (found.degrees["ring"], found.degrees["ulysses"]) == (ring, ulysses)
    assert in_a_grid(analysed, Mesh.of(ulysses=4), Machine(bytes=1e12)) == Mesh.of(ulysses=4)


def uneven(example: dict[str, Any]) -> dict[str, Any]:
    """With other rows and columns."""
    changed = dict(example)
    for name, value in example.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 4:
            scale = max(value.shape[-2] // 32, 1)
            changed[name] = torch.randn(*value.shape[:-2], ROWS * scale, COLUMNS * scale)
    return changed


def of_images(name: str, call: str) -> bool:
    """Whether something has rows and columns; sound has samples."""
    return any(len(getattr(given, "shape", ())) >= 4 for given in models.part(name).calls[call].values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" in metafunc.fixturenames:
        every = [(name, call) for name, call in map(str.split, models.part_calls())]
        spatial = [case for case in every if of_images(*case) and case not in LEFT_OUT]
        metafunc.parametrize(("name", "call"), spatial if metafunc.config.getoption("--zoo-all") else [])


def test_every_autoencoder_is_exact(name: str, call: str) -> None:
    method, example = models.load_part(name, call)
    torch.manual_seed(1)
    example = uneven(example)
    traced = xir.trace(method, example)
    for degrees in GRIDS:
        parallel = traced.parallelize(machine=SLOW, **degrees)
        result = check_parallel(parallel, method, example)
        assert result.ok, f"{degrees}: {result}"

"""Full-size models in stages, from the meta device: balanced, and each rank with its own weights and buffers."""

from __future__ import annotations

import functools

import pytest

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram, TracedProgram
from xdit_ir.ir.program import STAGE
from xdit_ir.passes.partition_stages import PartitionStages
from xdit_ir.sharding.report import Report

BALANCE = {
    "flux.1-dev": {2: 0.97, 4: 0.97, 8: 0.93},
    "sd3.5-large": {2: 0.97, 4: 0.97, 8: 0.95},
    "wan2.1-t2v-14b": {2: 0.97, 4: 0.97, 8: 0.99},
    "hunyuandit": {8: 0.93},
}
# No rank has more than this times its share of the weights. HunyuanDiT's skips come first: its weights are uneven.
WEIGHTS = {"flux.1-dev": 1.1, "sd3.5-large": 1.1, "wan2.1-t2v-14b": 1.1, "hunyuandit": 1.3}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The last model, with long skips; all with `--zoo-all`."""
    if "name" in metafunc.fixturenames:
        names = list(BALANCE)
        metafunc.parametrize("name", names if metafunc.config.getoption("--zoo-all") else names[-1:])


@functools.cache
def traced(name: str) -> TracedProgram:
    return xir.trace(*models.load(name, device="meta"))


def balance(report: Report) -> float:
    return report.flops_total / len(report.flops_per_rank) / max(report.flops_per_rank)


def block_bytes(parallel: ParallelProgram) -> list[int]:
    """Bytes of the weights of repeated blocks on every rank."""
    prefixes = tuple(f"{call.args[1]}." for call in parallel.original.calls)
    assert parallel.pipeline is not None
    names = map(parallel.pipeline.weights_of, range(parallel.world_size))
    return [sum(parallel.original.state[n].nbytes for n in mine if n.startswith(prefixes)) for mine in names]


def test_stages_are_balanced_and_nothing_is_done_twice(name: str) -> None:
    for count, least in BALANCE[name].items():
        parallel = traced(name).parallelize(pipefusion=count, patches=1)
        report = parallel.report()
        assert balance(report) >= least, count
        assert sum(report.flops_per_rank) <= 1.001 * report.flops_total
        assert sum(report.weight_bytes_per_rank) <= 1.05 * report.weight_bytes_total
        assert max(report.weight_bytes_per_rank) <= WEIGHTS[name] / count * report.weight_bytes_total
        blocks = block_bytes(parallel)
        assert max(blocks) <= WEIGHTS[name] / count * sum(blocks)


def test_patches_add_no_work(name: str) -> None:
    """Text is computed once a step, and so is all that does not depend on the latents."""
    report = traced(name).parallelize(pipefusion=2, patches=4).report()
    assert sum(report.flops_per_rank) <= 1.001 * report.flops_total
    assert min(report.buffer_bytes_per_rank) > 0
    [sends] = [entry for entry in report.collectives if entry.kind == "send"]
    assert sends.count == 4, "each rank sends every patch once, folded or not"


def test_given_stages_count_blocks() -> None:
    tiny = xir.trace(*models.load("pixart-sigma:tiny"))
    calls = len(list(tiny.analysed.calls))
    program = PartitionStages(2, (1, calls - 1)).apply(tiny.analysed)
    assert [call.meta[STAGE] for call in program.calls] == [0] + [1] * (calls - 1)
    with pytest.raises(xir.ParallelizeError, match="for example"):
        tiny.parallelize(pipefusion=2, stages=[calls, 0])


def test_long_skips_stay_on_their_rank() -> None:
    sent = []
    for stages in (None, [20, 20]):
        report = traced("hunyuandit").parallelize(pipefusion=2, patches=1, stages=stages).report()
        sent += [entry.bytes_per_rank for entry in report.collectives if entry.kind == "send"]
    assert 4 * sent[0] <= sent[1], "folded by itself, against one cut in the middle"

"""Full-size models from the meta device: quick, small, and with the traffic that theory says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import xdit_ir as xir
from xdit_ir import models

MEASURE = """
import json, resource, sys, time
import xdit_ir as xir
from xdit_ir import models
model, example = models.load(sys.argv[1], device="meta")
start = time.perf_counter()
report = xir.trace(model, example).parallelize(ulysses=4, ring=2).report()
seconds, reasons = time.perf_counter() - start, [one.reason for one in report.fallbacks]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, peak, max(report.flops_per_rank) / report.flops_total, reasons]))
"""

BARS = ("flux.1-dev", "sd3.5-large", "wan2.1-t2v-14b", "hunyuandit")
# Published sizes that cannot be traced or divided yet, as their tiny versions (see test_zoo.py).
NOT_YET = {"hidream-i1"}


# Layers, tokens and width of self-attention.
THEORY = {
    "flux.1-dev": (57, 4096 + 512, 3072),
    "wan2.1-t2v-14b": (40, 32760, 5120),
    "hunyuandit": (40, 4096, 1408),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every twelfth of the published sizes, one of the bars and of the theory; all of them with `--zoo-all`."""
    everything = metafunc.config.getoption("--zoo-all")
    if "layers" in metafunc.fixturenames:
        cases = [(name, *sizes) for name, sizes in THEORY.items()]
        metafunc.parametrize(("name", "layers", "tokens", "hidden"), cases if everything else cases[:1])
    if "published" in metafunc.fixturenames:
        names = [name for name in models.names() if models.entry(name).full is not None and name not in NOT_YET]
        metafunc.parametrize("published", names if everything else names[::12])
    if "name" in metafunc.fixturenames and "layers" not in metafunc.fixturenames:
        metafunc.parametrize("name", BARS if everything else BARS[-1:])


def test_published_sizes_are_divided(published: str) -> None:
    model, example = models.load(published, device="meta", dtype=torch.bfloat16)
    traced = xir.trace(model, example)
    report = traced.parallelize(ulysses=4, ring=2).report()
    assert max(report.flops_per_rank) <= 0.17 * report.flops_total
    assert len(traced.ir.blocks) < len(list(traced.ir.calls))


def test_traced_and_divided_in_little_memory(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
    _, peak, slowest, fallbacks = json.loads(run.stdout.splitlines()[-1])
    assert peak < 4 * 2**30
    assert slowest <= 0.13
    assert all("gathered before the block" in reason for reason in fallbacks)


def test_ulysses_sends_what_theory_says(name: str, layers: int, tokens: int, hidden: int) -> None:
    """Four exchanges a self-attention layer, of which each rank keeps 1/N of its 1/N."""
    ranks = 8
    model, example = models.load(name, device="meta")
    itemsize = next(model.parameters()).dtype.itemsize
    batch = example["hidden_states"].shape[0]
    report = xir.trace(model, example).parallelize(ulysses=ranks).report()
    [exchange] = [entry for entry in report.collectives if entry.kind == "all_to_all"]
    assert exchange.count == 4 * layers
    assert exchange.bytes_per_rank == layers * 4 * (batch * tokens * hidden * itemsize) * (ranks - 1) // ranks**2

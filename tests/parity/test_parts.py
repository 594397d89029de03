"""Decoders and encoders beside the denoisers: each rank's result is that of the module, and the work is divided.

Each runs under one number of ranks in rotation, a few in CI; `--zoo-all` runs all of them under 2, 3 and 4.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models import autoencoders

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.outputs import output_tensors
from xdit_ir.checking.check import check_parallel

CASES = [(name, call) for name, call in map(str.split, models.part_calls())]
RANKS = (2, 3, 4)
# The slowest rank may do so much of the work, at 2 and 4 ranks.
SHARES = {2: 0.54, 4: 0.30}
# What CI runs: one of each kind of operator and way of being divided.
IN_CI = {
    ("kl", "encode"),
    ("dc", "decode"),
    ("tiny", "decode"),
    ("oobleck", "decode"),
    ("cosmos3-audio", "encode"),
    ("kvae", "decode"),
    ("mochi", "encode"),
    ("temporal-decoder", "decode"),
    ("gemma2", "forward"),
    ("t5", "forward"),
}
# What draws noise, each rank its own when all are simulated in one process: only the division is looked at.
DRAWS = {("consistency", "decode")}
# Autoencoders of diffusers that are not here, and why.
MISSING = {
    "LTX2VideoDiffusionDecoderModel": "its dense flex_attention takes minutes on a CPU, alone too",
    "RFD4ProteinaAutoencoder": "of atoms of proteins, by tables that come with its checkpoint",
}
# What is not divided well, and why; what no longer belongs here fails.
UNEVEN: dict[tuple[str, str], str] = {
    ("allegro", "decode"): "it decodes in tiles always; the seven of this size are shared out whole, four to a rank",
}
# What cannot be captured: a part of the error.
REFUSED: dict[tuple[str, str], str] = {}


def selected(config: pytest.Config) -> list[tuple[str, str]]:
    return CASES if config.getoption("--zoo-all") else [case for case in CASES if case in IN_CI]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" in metafunc.fixturenames:
        cases = [case for case in selected(metafunc.config) if case not in REFUSED]
        metafunc.parametrize(("name", "call"), cases, ids=map(" ".join, cases))


def test_it_is_exact_and_divided(name: str, call: str, pytestconfig: pytest.Config) -> None:
    method, example = models.load_part(name, call)
    with torch.no_grad():
        assert output_tensors(method(**example))[0].float().std() > 0.01, "what is constant proves nothing"
    traced = xir.trace(method, example)
    everything = pytestconfig.getoption("--zoo-all")
    for ranks in RANKS if everything else [RANKS[CASES.index((name, call)) % len(RANKS)]]:
        parallel = traced.parallelize(ulysses=ranks)
        torch.manual_seed(0)
        result = check_parallel(parallel, method, example)
        assert result.ok or (name, call) in DRAWS, f"{ranks} ranks: {result}"
    shares = {ranks: traced.parallelize(ulysses=ranks).report().share for ranks in SHARES}
    uneven = any(share > SHARES[ranks] for ranks, share in shares.items())
    assert uneven == ((name, call) in UNEVEN), shares


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_the_reason(case: tuple[str, str]) -> None:
    with pytest.raises(xir.TraceError, match=REFUSED[case]):
        xir.trace(*models.load_part(*case))


def test_every_autoencoder_of_diffusers_is_here() -> None:
    exported = {name for name, item in vars(autoencoders).items() if isinstance(item, type)}
    assert exported - {models.part(name).cls for name in models.part_names()} == {*MISSING}


def test_tables_name_parts_of_the_zoo() -> None:
    assert {*UNEVEN, *REFUSED, *IN_CI, *DRAWS} <= {*CASES}


def test_nine_of_ten_are_divided() -> None:
    assert len({*UNEVEN, *REFUSED}) <= math.floor(0.10 * len(CASES))

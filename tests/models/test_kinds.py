"""Small modules that each do one thing that research code does: exact, and shared evenly, or refused with the reason.

A few run under one set of degrees each; `--zoo-all` runs all under all.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

from xdit_ir import models
from xdit_ir.degrees import Degrees
from xdit_ir.tools.survey import DEGREES, Subject

KINDS = models.kinds()
# What runs without `--zoo-all`: one of every group.
FEW = (
    *("kind-finite-only", "kind-object-leaves", "kind-masked-tokens", "kind-fills-table", "kind-by-modality"),
    *("kind-shifted-windows", "kind-padded-stream", "kind-state-space", "kind-scan-operator", "kind-vectorised"),
    "kind-pooled-text",
)
# What it says where a kind cannot be divided so.
REFUSED = {
    ("kind-few-rows", "c"): "batch of 1",
    ("kind-packed-samples", "c"): "packed into one sequence",
}
# Where the slowest of four ranks does more than this part of the work, and why no other can do it.
SHARE = 0.30
UNEVEN = {"kind-recurrent": "a recurrence that is not linear needs all tokens in order: samples are divided"}
WIDEST = Degrees.of(ulysses=4)


def rotation(name: str, *, everything: bool) -> list[Degrees]:
    return list(DEGREES) if everything else [DEGREES[FEW.index(name) % len(DEGREES)]]


@pytest.mark.parametrize("name", KINDS)
def test_exact_and_shared(name: str, pytestconfig: pytest.Config) -> None:
    everything = pytestconfig.getoption("--zoo-all")
    if name not in FEW and not everything:
        pytest.skip("runs with --zoo-all")
    subject = Subject(name)
    for degrees in rotation(name, everything=everything):
        outcome = subject.outcome(degrees)
        why = next((why for (kind, letter), why in REFUSED.items() if kind == name and letter in str(degrees)), "")
        assert bool(outcome.refused) == bool(why) and why in outcome.refused, outcome.refused
        assert outcome.refused or outcome.exact, f"{degrees}: relative error {outcome.error:.1e}"
    share = subject.outcome(WIDEST, run=False).slowest
    assert (share > SHARE) == (name in UNEVEN), f"slowest rank {share:.3f}"


def test_tables_name_kinds() -> None:
    assert {*FEW, *UNEVEN, *(name for name, _ in REFUSED)} <= set(KINDS)
    assert len(KINDS) >= 25 and not set(KINDS) & set(models.names())


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_short(name: str) -> None:
    module, _, kind = models.entry(name).cls.partition(":")
    assert len(inspect.getsource(getattr(importlib.import_module(module), kind)).splitlines()) <= 40

"""`assert_parallel` and the pytest plugin: right models pass, wrong ranks fail, wrong use is explained."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir.kernels import attention
from xdit_ir.testing import assert_parallel, degree_sets, degrees_of

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def build():
    torch.manual_seed(0)
    return Attention().eval(), {"x": torch.randn(1, 13, 8)}


@pytest.mark.xdit(degrees="u2,r3")
def test_asked(xdit):
    xdit(*build())


@pytest.mark.xdit(degrees=["u2"], max_share=0.4, max_fallbacks=0)
def test_uneven(xdit):
    xdit(*build())


@pytest.mark.xdit(world_size=2)
def test_every_way(xdit):
    xdit(*build())


@pytest.mark.xdit(degrees=["c2"])
def test_illegal(xdit):
    xdit(*build())


@pytest.mark.xdit(degrees=["p2"], processes=True)
def test_processes(xdit):
    xdit(*build())


@pytest.mark.xdit(degrees=["u2"])
def test_broken(xdit, monkeypatch):
    from xdit_ir.simulation import lockstep as simulate
    right = simulate.unpack
    monkeypatch.setattr(simulate, "unpack", lambda pieces, exchange: 2 * right(pieces, exchange))
    xdit(*build())


def test_unmarked(xdit):
    pass
"""


def built() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model of the tests that the plugin runs, and its arguments."""
    space: dict[str, Any] = {"__name__": "built"}
    exec(TESTS, space)
    pair: tuple[torch.nn.Module, dict[str, torch.Tensor]] = space["build"]()
    return pair


def test_a_right_model_passes() -> None:
    assert_parallel(*built(), degrees=["u2", {"ring": 2}])


def test_a_wrong_rank_fails_and_all_such_sets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(a: Any, lse: Any, b: Any, other: Any) -> Any:
        return a + b, torch.logaddexp(lse, other)

    monkeypatch.setattr(attention, "merge", merge)
    with pytest.raises(AssertionError, match=r"(?s)^r2: DIFFERENT.*attention on rank.*\nr3: DIFFERENT.*wrong on all 3"):
        assert_parallel(*built(), degrees="r2,u2,r3")


def test_what_costs_too_much_fails() -> None:
    assert_parallel(*built(), degrees="u2", max_share=0.55, max_fallbacks=0)
    with pytest.raises(AssertionError, match=r"^r2: the slowest rank does 0\.5\d* of the FLOPs, above 0\.5 "):
        assert_parallel(*built(), degrees="r2", max_share=0.5)
    with pytest.raises(xir.XditError, match=r"max_share=0 is no part"):
        assert_parallel(*built(), degrees="u2", max_share=0)


def test_illegal_degrees_are_an_error() -> None:
    with pytest.raises(xir.ParallelizeError, match="cfg=1"):
        assert_parallel(*built(), degrees="c3")


def test_sets_of_degrees() -> None:
    assert degrees_of(4) == ["u4", "r2u2", "r4", "c2u2", "c2r2"]
    assert degree_sets({"pipefusion": 2, "patches": 4}) == {"pipefusion=2,patches=4": {"pipefusion": 2, "patches": 4}}
    assert list(degree_sets(["u2,r2", "c2"])) == ["u2", "r2", "c2"]


def test_the_plugin(tmp_path: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, module = (part.strip() for part in config["options.entry_points"]["pytest11"].split("="))
    assert name == "xdit"
    (tmp_path / "test_model.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", module, "-rA", "--strict-markers", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {
        (verdict, test)
        for verdict, test in re.findall(
            r"(?m)^(PASSED|FAILED|SKIPPED|ERROR) (?:\[1\] )?test_model.py::(\S+)", done.stdout
        )
    }
    assert found == {
        ("PASSED", "test_asked[u2]"),
        ("PASSED", "test_asked[r3]"),
        ("FAILED", "test_uneven[u2]"),
        ("PASSED", "test_every_way[u2]"),
        ("PASSED", "test_every_way[r2]"),
        ("FAILED", "test_illegal[c2]"),
        ("PASSED", "test_processes[p2]"),
        ("FAILED", "test_broken[u2]"),
        ("ERROR", "test_unmarked"),
    }, done.stdout + done.stderr
    assert "test_model.py:" in done.stdout and "all_to_all" in done.stdout
    assert re.search(r"SKIPPED \[1\] .*cfg=2 divides the batch", done.stdout)
    assert "the fixture xdit needs the marker" in done.stdout

"""`xdit-ir calibrate` measures a machine and writes it as a file, which is taken by itself afterwards."""

from __future__ import annotations

import itertools
import time
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir.planning import measured
from xdit_ir.planning.hardware import hardware_here, hardware_of, kept_data, load, names
from xdit_ir.tools import calibrate_kernels, calibrate_worker
from xdit_ir.tools.cli import main

CPU = torch.device("cpu")


def calibrated(output: Path, seconds: float = 60.0) -> None:
    with torch.inference_mode():
        calibrate_worker.calibrate(CPU, output, time.monotonic() + seconds, least=0.01)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return measured.folder()


def test_it_is_taken_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hardware_here(CPU) == load("cpu")
    calibrated(folder / measured.file_name("cpu"))
    said = capsys.readouterr().out
    assert {"products = ", "attention = ", "memory = ", "fused = ", "gap = "} <= {
        line.partition("= ")[0] + "= " for line in said.splitlines()
    }
    here = hardware_here(CPU)
    assert here.name == "cpu-measured" and here == load("cpu-measured") == hardware_of("cpu-measured")
    assert 1e8 < here.kernels.products < 1e14 and here.kernels.products != load("cpu").kernels.products
    source = here.sources["products"]
    assert source.startswith("measured by xdit-ir calibrate on 20") and f"torch {torch.__version__}" in source
    assert here.sources["gib"].startswith("not measured; of cpu: ")
    data = tomllib.loads((folder / "cpu-measured.toml").read_text())
    assert {*data["kernels"], "gib", "host", "host_exchange", "links", "choices", "upload"} == set(data["sources"])


def test_what_fails_is_left_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Any) -> dict[str, float]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(calibrate_kernels, "attention", broken)
    calibrated(tmp_path / "here.toml")
    assert "broken: not measured, RuntimeError: no such kernel" in capsys.readouterr().out
    here = load(str(tmp_path / "here.toml"))
    assert here.kernels.attention == load("cpu").kernels.attention
    assert here.sources["attention"].startswith("not measured; of cpu")
    assert here.sources["memory"].startswith("measured by")


def test_it_ends_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated(tmp_path / "here.toml", seconds=-1)
    assert capsys.readouterr().out.count("left out, there is no time left") == 5
    assert load(str(tmp_path / "here.toml")).kernels == load("cpu").kernels


def test_figures_of_products_are_found_again() -> None:
    kernels = load("h100").kernels
    shapes = itertools.product((576, 4608, 8192), (3072, 12288), (3072, 12288))
    taken = [
        (m, n, k, kernels.product_seconds(2 * m * n * k, m * n, 0, torch.bfloat16) - kernels.gap) for m, n, k in shapes
    ]
    found = calibrate_kernels.fitted(taken)
    assert found == {"products": pytest.approx(kernels.products), "fill": kernels.fill, "depth": kernels.depth}


def test_figures_of_a_link_are_found_again() -> None:
    [link] = load("h100").links
    taken = [(size, link.seconds(size)) for size in (1e6, 4e6, 16e6, 64e6)]
    assert calibrate_kernels.line(taken) == (pytest.approx(link.latency), pytest.approx(link.bytes))
    falling = [(1e6, 2.0), (2e6, 1.0)]
    start, speed = calibrate_kernels.line(falling)
    assert start >= 0 and speed > 0, "a figure must be one that a machine can have"


@pytest.mark.parametrize("name", names())
def test_what_is_written_reads_as_it_was(name: str) -> None:
    assert tomllib.loads(measured.to_toml(kept_data(name))) == kept_data(name)


def test_a_file_that_is_no_machine(tmp_path: Path) -> None:
    (tmp_path / "here.toml").write_text("title = 3")
    for name, why in (("here.toml", "is no machine as `xdit-ir calibrate` writes it"), ("none.toml", "`.* writes one")):
        with pytest.raises(xir.ParallelizeError, match=f"{name}.*{why}"):
            load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("figure", "other"), [("products = 740e12", "products = 0"), ("latency = 15e-6", "latency = -1"), ("gap", "gaps")]
)
def test_a_figure_that_no_machine_has(tmp_path: Path, figure: str, other: str) -> None:
    kept = resources.files("xdit_ir.planning").joinpath("machines/h100.toml").read_text("utf-8")
    assert figure in kept
    (tmp_path / "here.toml").write_text(kept.replace(figure, other, 1))
    with pytest.raises(xir.ParallelizeError, match="is no machine as `xdit-ir calibrate` writes it"):
        load(str(tmp_path / "here.toml"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--gpus 1 --output /no/such/here.toml", "--output /no/such/here.toml: there is no folder /no/such"),
        ("--gpus 1 --output /", "--output / is a folder: expected a file, such as /here.toml"),
        ("--gpus 0", "--gpus 0: expected 1 to 64 on cpu; nearest legal: 1"),
        ("--gpus 65", "--gpus 65: expected 1 to 64 on cpu; nearest legal: 64"),
        ("--seconds nan", "--seconds nan: expected a positive number, such as 100"),
        ("--seconds -1", "--seconds -1: expected a positive number, such as 100"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--device", "cpu", *given.split()]) == 2
    assert said in capsys.readouterr().err

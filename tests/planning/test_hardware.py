"""Machines are files of figures, each with its source."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir import Machine
from xdit_ir.ir.mesh import Mesh
from xdit_ir.planning.hardware import Hardware, hardware_named, hardware_of, load, names, parse

KEPT = ("h100", "h200", "a100", "l20", "l40s", "rtx4090", "rtx4090-p2p", "rtx5090", "rtx5090-p2p", "h100-infiniband")


def data(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("xdit_ir.planning").joinpath(f"machines/{name}.toml").read_text("utf-8"))


def test_those_that_are_kept() -> None:
    assert set(names()) == {*KEPT, "cpu"}


@pytest.mark.parametrize("name", [*KEPT, "cpu"])
def test_every_figure_has_a_source(name: str) -> None:
    found = data(name)
    figures = {key for key, value in found.items() if isinstance(value, float | int) and not isinstance(value, bool)}
    assert figures | set(found["kernels"]) | {"links", "choices", "upload"} == set(found["sources"])
    assert all(len(source) > 5 for source in found["sources"].values())
    assert isinstance(load(name), Hardware)


@pytest.mark.parametrize("name", KEPT)
def test_figures_are_in_proportion(name: str) -> None:
    kernels = load(name).kernels
    assert 0 < kernels.single < kernels.products < kernels.flash
    assert 0 < kernels.fused < kernels.memory < kernels.products / 50


def test_larger_products_are_nearer_to_the_peak() -> None:
    kernels = load("h100").kernels
    speeds = []
    for size in (512, 2048, 8192):
        flops, moved = 2 * size**3, 3 * 2 * size**2
        speeds.append(flops / kernels.product_seconds(flops, size**2, moved, torch.bfloat16))
    assert speeds == sorted(speeds) and speeds[0] < 0.2 * speeds[2] and speeds[2] < kernels.products


def test_a_product_with_few_rows_is_bound_by_reading_weights() -> None:
    kernels, weights = load("h100").kernels, 2 * 3072 * 18432
    taken = kernels.product_seconds(2 * 3072 * 18432, 18432, weights, torch.bfloat16)
    assert taken == pytest.approx(weights / kernels.memory + kernels.gap)


def test_narrow_heads_are_slower_and_padded() -> None:
    kernels = load("h100").kernels
    wide, narrow, odd = (1e12 / kernels.attention_seconds(1e12, w, torch.bfloat16, flash=False) for w in (128, 64, 72))
    assert wide > narrow > odd


def test_links_reach_as_far_as_they_say() -> None:
    nodes = load("h100-infiniband")
    inside, between = nodes.links
    assert nodes.link(range(8, 16)) == inside and nodes.link((7, 8)) == between
    assert not any(link.hidden for link in nodes.links), "copy engines do not reach other hosts"


def test_the_same_gpus_in_hosts() -> None:
    inside, between = load("h100").on_hosts(2).links
    assert inside.ranks == 2 and not inside.hidden and between == load("h100-infiniband").links[-1]
    slow = load("cpu").on_hosts(2)
    assert slow.link((1, 2)).bytes == slow.link((0, 1)).bytes, "not faster than inside"


def test_of_what_ranks_of_two_nodes_exchange_a_part_stays_inside() -> None:
    nodes, sent = load("h100-infiniband"), 64e6
    inside, between = nodes.links
    assert nodes.seconds(0, range(8), sent) == inside.seconds(sent)
    assert nodes.seconds(0, range(16), sent) == pytest.approx(between.latency + sent * 8 / 15 / between.bytes)
    assert nodes.seconds(0, (0, 8), sent) == between.seconds(sent)
    assert nodes.seconds(0, (0,), sent) == nodes.seconds(0, range(16), 0) == 0


def test_the_mesh_dims_that_reach_other_nodes() -> None:
    nodes = load("h100-infiniband")
    assert nodes.between(Mesh.of(cfg=2, ulysses=8)) == ("cfg",)
    assert nodes.between(Mesh.of(ring=2, ulysses=16)) == ("ring", "ulysses")
    assert nodes.between(Mesh.of(ulysses=8)) == load("h100").between(Mesh.of(ulysses=8)) == ()


def test_what_names_a_machine() -> None:
    assert hardware_of(Machine()) == load("h100") == hardware_of("h100") == parse("h100")
    assert parse("bytes=25e9").machine == Machine(bytes=25e9)
    assert hardware_named("NVIDIA A100-SXM4-80GB").name == "a100"
    assert hardware_named("NVIDIA GeForce RTX 5090").name == "rtx5090"
    assert hardware_named("a GPU of tomorrow").name == "h100"
    with pytest.raises(xir.ParallelizeError, match=r"machine='h201' is none that is kept; did you mean 'h20"):
        load("h201")


@pytest.mark.parametrize(
    ("line", "other", "said"),
    [
        ("gib = 79.2", 'gib = "79.2"', "gib = '79.2': expected a number"),
        ("gib = 79.2", "gib = 0", "gib = 0"),
        ("gib = 79.2", "gibs = 79.2", "gibs is not known; did you mean 'gib'"),
        ("host = 25e-6", "", "host is missing"),
        ("products = 740e12", "product = 740e12", "kernels.product is not known; did you mean 'products'"),
        ("products = 740e12", "products = true", "kernels.products = True: expected a number"),
        ("single = 50e12", "single = nan", "kernels.single = nan: expected a number"),
        ("ranks = 8", "ranks = 8.5", "links[0].ranks = 8.5: expected a whole number"),
        ("latency = 15e-6", "", "links[0].latency is missing"),
        ('devices = ["H100 80GB HBM3", "H100 SXM"]', 'devices = "H100"', "devices = 'H100': expected a list"),
        ("flops = 500e12", "flops = -1", "choices: Machine(flops=-1): expected a positive number"),
        ("[[links]]", "[links]", "links = {'ranks': 8"),
        ("[kernels]", "[kernels", "no machine"),
        ("tile = 128", "tile = 128\n[[links]]\nranks = 16\nbytes = 1e9\nlatency = 0", "links have ranks = [16, 8]"),
    ],
)
def test_a_file_of_ones_own_with_a_wrong_figure_is_refused_by_its_name(
    line: str, other: str, said: str, tmp_path: Path
) -> None:
    kept = resources.files("xdit_ir.planning").joinpath("machines/h100.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text(kept.replace(line, other, 1))
    with pytest.raises(xir.ParallelizeError) as refused:
        load(str(tmp_path / "mine.toml"))
    assert "mine.toml is no machine" in str(refused.value) and said in str(refused.value)
    (tmp_path / "mine.toml").write_text(kept)
    assert load(str(tmp_path / "mine.toml")).kernels == load("h100").kernels

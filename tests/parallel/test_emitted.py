"""Emitted and ported modules on real processes against one device; every assertion holds on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Pools = Callable[[int], Any]

MODELS = (
    "flux.1-dev",
    "sd3.5-large",
    "pixart-sigma",
    "wan2.1-t2v-14b",
    "cogvideox-5b",
    "hunyuandit",
    "qwen-image",
    "latte-1",
    "sana-1600m",
)
ULYSSES = {"ulysses": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every third of the models, on four ranks others than on two; all of them with `--zoo-all`."""
    if "name" in metafunc.fixturenames:
        step = 1 if metafunc.config.getoption("--zoo-all") else 3
        first = int("four" in metafunc.function.__name__) % step
        metafunc.parametrize("name", MODELS[first::step])


def test_two_ranks_compute_what_one_device_does(workers: Pools, name: str) -> None:
    for result in workers(2).run("equal_outputs", name=name, degree_sets=[ULYSSES, {"ring": 2}, {"cfg": 2}]):
        assert max(result["errors"]) < 1e-5, result
        assert all(result["kinds"])


def test_four_ranks_compute_what_one_device_does(workers: Pools, name: str, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    for result in workers(4).run("equal_outputs", name=name, degree_sets=[{"ulysses": 2, "ring": 2}]):
        assert max(result["errors"]) < 1e-5, result


def test_a_submodule_that_cannot_be_captured_runs_on_every_rank(workers: Pools) -> None:
    for result in workers(2).run("equal_outputs", name="hidream-i1", degree_sets=[ULYSSES]):
        assert max(result["errors"]) < 1e-5, result


def test_what_forward_writes_into_a_cache_is_there_on_every_rank(workers: Pools) -> None:
    for result in workers(2).run("left_behind", name="wan-animate-2-reference", degrees=ULYSSES):
        assert result["error"] < 1e-5 and result["kept"] < 1e-5 and result["written"] > 0, result


def test_reloaded_weights_take_effect(workers: Pools) -> None:
    for result in workers(2).run("reloaded_weights", name="sana-1600m", degrees=ULYSSES):
        assert max(result["errors"]) < 1e-5
        assert result["programs"] == 1


def test_what_was_guarded_makes_a_new_specialisation(workers: Pools) -> None:
    for seen in workers(2).run("specialisations", degrees=ULYSSES):
        assert [count for count, *_ in seen] == [1, 1, 2, 3, 4, 4, 5]
        assert max(error for _, error, _ in seen) < 1e-5
        assert all(first for *_, first in seen)


def test_a_changed_module_is_traced_anew(workers: Pools) -> None:
    for seen in workers(2).run("changed_model", degrees=ULYSSES):
        assert max(error for _, error in seen) < 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("shape", ("x", "float32[2, 12, 8]", "float32[2, 14, 8]")),
        ("dtype", ("x", "float32[2, 12, 8]", "float64[2, 12, 8]")),
        ("value", ("flip", "True")),
        ("contents", ("lengths", "contents")),
        ("unknown", ("surplus",)),
        ("meta", ("x", "meta device")),
    ],
)
@pytest.mark.parametrize("how", ["emit", "port", "first call"])
def test_different_calls_are_refused_on_every_rank(
    workers: Pools, change: str, named: tuple[str, ...], how: str
) -> None:
    results = workers(2).run("differing_inputs", change=change, degrees=ULYSSES, how=how, limit=60)
    for rank, result in enumerate(results):
        assert result["error"] == "MismatchError", result
        assert all(part in result["message"] for part in named), result
        assert f"rank {rank} (this one)" in result["message"]
        assert result["seconds"] < 20
        assert result["afterwards"] < 1e-5


@pytest.mark.parametrize("how", ["emit", "port"])
def test_a_gradient_that_one_rank_wants_is_refused_on_all(workers: Pools, how: str) -> None:
    alone, wants = workers(2).run("gradient_on_one_rank", degrees=ULYSSES, how=how, limit=60)
    for result in (alone, wants):
        assert result["error"] == "MismatchError", result
        assert "GradientError: x requires a gradient" in result["message"] and result["seconds"] < 20
        assert result["afterwards"] < 1e-5


def test_ranks_must_draw_the_same_noise(workers: Pools) -> None:
    for different, rounded in workers(2).run("other_noise", degrees=ULYSSES):
        assert different["error"] == "MismatchError"
        assert "x: its contents differ: rank 1" in different["message"] and "seed" in different["message"]
        assert rounded["error"] == "", rounded


def test_a_trace_that_fails_on_one_rank_fails_on_all(workers: Pools) -> None:
    for result in workers(2).run("failing_trace", degrees=ULYSSES):
        assert result["error"] == "MismatchError"
        assert "ZeroDivisionError" in result["message"]


def test_what_all_ranks_refuse_is_raised_as_it_is(workers: Pools) -> None:
    """In each one's own words, which need not be the same."""
    for rank, result in enumerate(workers(2).run("refused_on_all", degrees={"cfg": 2})):
        assert (result["error"], result["message"]) == ("ValueError", f"rank {rank} does not like it")
        assert result["seconds"] < 20 and result["afterwards"] == 0


def test_cfg_needs_a_batch(workers: Pools) -> None:
    for result in workers(2).run("batch_of_one", name="sana-1600m"):
        assert result["error"] == "ParallelizeError", result
        assert result["programs"] == 2
        assert max(result["alone"], result["afterwards"]) < 1e-5


def test_the_number_of_processes_must_fit(workers: Pools) -> None:
    for results in workers(2).run("wrong_world_size", degrees={"ulysses": 3}):
        for result in results:
            assert result["error"] == "ParallelizeError"
            assert "ulysses=3 needs 3 processes, this job has 2; nearest legal: ulysses=2" in result["message"]


def test_the_handshake_can_be_left_out(workers: Pools) -> None:
    assert max(workers(2).run("no_handshake", degrees=ULYSSES)) < 1e-5


@pytest.mark.parametrize("degrees", [ULYSSES, {"ring": 2}])
def test_blocks_compile_once_each(workers: Pools, degrees: dict[str, int]) -> None:
    for result in workers(2).run("compiled_bodies", name="wan2.1-t2v-14b", degrees=degrees):
        assert result["error"] < 1e-5
        assert result["graphs"] == result["bodies"] > 0


def test_a_further_shape_compiles_nothing_on_any_rank(workers: Pools) -> None:
    for first, *further in workers(2).run("new_shapes", degrees=ULYSSES):
        assert first["compiled"] > 0
        assert [call["compiled"] for call in further] == [0, 0, 0]
        assert max(call["error"] for call in (first, *further)) < 1e-5


def test_a_ported_pipeline_makes_the_same_image(workers: Pools) -> None:
    for result in workers(2).run("pipeline", degrees=ULYSSES, steps=3):
        assert result["error"] < 1e-4
        assert result["spread"] > 1e-3
        assert result["programs"] == 1


def test_tiles_of_attention_on_four_ranks(workers: Pools, request: pytest.FixtureRequest) -> None:
    """Links so slow that queries and keys travel rather than keys alone."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: four processes")
    for result in workers(4).run("tiled", name="flux.1-dev", degrees={"ring": 4}):
        assert result["error"] < 1e-5 and result["tiles"] == 2, result

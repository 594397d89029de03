"""PipeFusion on real processes: what runs is what is simulated, and no stage waits for more than it must."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from xdit_ir.ir.mesh import MESH_DIMS

Pools = Callable[[int], Any]
Degrees = dict[str, Any]

SMALL = "pixart-sigma"
P2M4 = {"pipefusion": 2, "patches": 4}
TWO = [
    {"pipefusion": 2, "patches": 1},
    {"pipefusion": 2, "patches": 2},
    {"pipefusion": 2, "patches": 5, "warmup_steps": 2, "kv_cache_dtype": "fp8_e4m3"},
]
FOUR = [
    {"cfg": 2, "pipefusion": 2},
    {"pipefusion": 2, "patches": 4, "ulysses": 2},
    {"pipefusion": 4, "patches": 5},
    {"pipefusion": 2, "patches": 2, "ring": 2},
]
MODELS = ("flux.1-dev", "sd3.5-large", "wan2.1-t2v-14b", "cogvideox-5b", "hunyuandit")


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--pipefusion-all"):
        pytest.skip("needs --pipefusion-all")


def check_steps(workers: Pools, count: int, name: str, degree_sets: list[Degrees]) -> None:
    for results in workers(count).run("emitted_steps", name=name, degree_sets=degree_sets):
        assert len(results) == len(degree_sets), results
        for result, degrees in zip(results, degree_sets, strict=True):
            assert max(result["errors"]) <= 1e-5 and result["deferred"], result
            assert (result["stale"] > 1e-4) == (degrees.get("patches", 2) > 1), "displaced steps differ from exact ones"


@pytest.mark.parametrize(("count", "degree_sets"), [(2, TWO), (4, FOUR[1:3])])
def test_emitted_steps_are_the_simulated_ones(workers: Pools, count: int, degree_sets: list[Degrees]) -> None:
    check_steps(workers, count, SMALL, degree_sets)


def test_with_a_text_stream(workers: Pools) -> None:
    check_steps(workers, 2, "flux.1-dev", [P2M4])


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", (SMALL, *MODELS))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_models_and_degrees(workers: Pools, name: str, count: int) -> None:
    three = [{"pipefusion": 3, "patches": patches} for patches in (1, 2, 4, 5)]
    four = [{"pipefusion": 4, "patches": patches} for patches in (1, 2, 4)]
    for degrees in {2: [*TWO, P2M4], 3: three, 4: [*FOUR, *four]}[count]:
        check_steps(workers, count, name, [degrees])


def check_images(workers: Pools, count: int = 2, passes: int | None = None, **case: Any) -> None:
    for answer in workers(count).run("images", cases=[case]):
        assert isinstance(answer, list), answer
        [result] = answer
        assert passes in (None, result["passes"])
        assert max(result["error"], result["again"]) <= 1e-5 < 1e-3 < result["stale"], result


@pytest.mark.parametrize(("scheduler", "modes"), [("ancestral", ["inference"])])
def test_any_scheduler(workers: Pools, scheduler: str, modes: list[str]) -> None:
    """A multistep one and a random one; `test_any_scheduler_in_any_mode` has all."""
    check_images(workers, pipeline="pixart", scheduler=scheduler, degrees=P2M4, modes=modes)


@pytest.mark.usefixtures("everything")
def test_flow_matching_with_autocast(workers: Pools) -> None:
    """The second call has latents of another type, so there are two programs, and two warmup steps."""
    check_images(workers, pipeline="flux", degrees=P2M4, modes=["autocast", "inference"])


def test_two_calls_in_a_step_keep_their_buffers_apart(workers: Pools) -> None:
    check_images(workers, pipeline="wan", lanes=2, degrees={"pipefusion": 2}, steps=4, passes=8)


def test_each_half_of_cfg_runs_one_of_two_calls(workers: Pools) -> None:
    degrees = {"cfg": 2, "pipefusion": 2, "patches": 4}
    check_images(workers, 4, pipeline="wan", lanes=2, degrees=degrees, steps=4, passes=4)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("modes", [[], ["autocast"], ["inference"], ["autocast", "inference"]])
@pytest.mark.parametrize("pipeline", ["flux", "sd3", "pixart", "wan", "cogvideo", "hunyuandit"])
def test_any_pipeline(workers: Pools, pipeline: str, modes: list[str]) -> None:
    lanes = 2 if pipeline == "wan" else 1
    check_images(workers, pipeline=pipeline, lanes=lanes, degrees=P2M4, modes=modes)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("modes", [[], ["autocast"], ["inference"]])
@pytest.mark.parametrize("scheduler", ["dpm", "unipc", "ddim", "ancestral"])
def test_any_scheduler_in_any_mode(workers: Pools, scheduler: str, modes: list[str]) -> None:
    check_images(workers, pipeline="pixart", scheduler=scheduler, degrees=P2M4, modes=modes)


def test_one_message_per_patch_and_boundary(workers: Pools) -> None:
    degrees = {**P2M4, "warmup_steps": 2}
    first, last = workers(2).run("counted_sends", name=SMALL, degrees=degrees, steps=6)
    wanted = (6 - 2) * 4 + 2
    assert first == {"forward": [wanted], "back": 0}
    assert last == {"forward": [], "back": wanted}


def test_a_step_begins_before_the_last_one_has_drained(workers: Pools) -> None:
    results = workers(2).run("overlapping_steps", name=SMALL, degrees=P2M4, steps=5)
    assert all(result["error"] <= 1e-5 for result in results), results
    began, drained = ({(step, patch): at for step, _, patch, at in result["trace"]} for result in results)
    for step in range(2, 5):
        assert began[step + 1, 0] < drained[step, 3]


def test_ranks_with_two_stages(workers: Pools) -> None:
    results = workers(2).run("folded_stages", name="hunyuandit", stages=[1, 2, 2, 1], patches=[2, 4])
    for rank, sets in enumerate(results):
        for patches, result in zip((2, 4), sets, strict=True):
            assert max(result["errors"]) <= 1e-5
            assert result["held"] > 0, "long skips stay on their rank"
            if rank == 0:
                assert result["trace"].index([3, 0, 0]) < result["trace"].index([2, patches - 1, 3]), "steps overlap"


def test_blocks_with_buffers_compile(workers: Pools) -> None:
    for result in workers(2).run("compiled_stages", name=SMALL, degrees={"pipefusion": 2}):
        assert max(result["errors"]) <= 1e-5


def test_an_exception_leaves_the_module_usable(workers: Pools) -> None:
    for result in workers(2).run("interrupted", name=SMALL, degrees=P2M4):
        assert set(result["failures"]) <= {"ArithmeticError", "LostError"}, "a rank may hear of the other's first"
        assert max(result["errors"]) <= 1e-5


def test_latents_from_elsewhere_begin_a_request(workers: Pools) -> None:
    for result in workers(2).run("plain_latents", name=SMALL, degrees=P2M4):
        assert max(result["errors"]) <= 1e-5 < 1e-3 < result["stale"], result


def test_causal_video_with_caches_of_keys_and_values(workers: Pools) -> None:
    """Steps read caches and overlap; what is left there is of no stale step."""
    for result in workers(2).run("causal_video", chunks=2, steps=3):
        assert max(result["caches"]) <= 1e-5 and result["note"] == [64, 128], result
        assert result["given"] and result["deferred"] == 6


def test_weights_of_other_stages_are_not_needed(workers: Pools) -> None:
    results = workers(2).run("only_its_stages", name=SMALL, degrees=P2M4)
    assert max(error for result in results for error in result["errors"]) <= 1e-5
    assert sum(result["share"] for result in results) <= 1.05


@pytest.mark.parametrize(
    "degrees",
    [
        {**P2M4, "stream_weights": "64KiB"},
        {"pipefusion": 2, "ulysses": 2, "shard_weights": True},
        {"pipefusion": 2, "cfg": 2, "stream_weights": True},
    ],
    ids=str,
)
def test_stages_divide_their_weights_or_have_them_with_the_host(
    request: pytest.FixtureRequest, workers: Pools, degrees: Degrees
) -> None:
    count = math.prod(size for name, size in degrees.items() if name in MESH_DIMS)
    if count > 2 and not request.config.getoption("--pipefusion-all"):
        pytest.skip("four processes (--pipefusion-all)")
    check_steps(workers, count, SMALL, [degrees])


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_rank_ends_the_others(workers: Pools, how: str) -> None:
    pool, seconds = type(workers(2))(2), 6
    try:
        arguments = {"name": SMALL, "degrees": P2M4, "how": how, "seconds": seconds}
        [result] = pool.run("lost_rank", lost=[1], **arguments)
    finally:
        pool.stop()
    assert result["error"] == "LostError" and "another rank has stopped" in result["message"], result
    assert result["seconds"] <= 2 * seconds


def test_calls_that_are_no_steps_of_a_request_leave_no_buffers(workers: Pools) -> None:
    """Even though what they gave is still held."""
    for result in workers(2).run("without_latents", name=SMALL, degrees={"pipefusion": 2}):
        assert max(result["errors"]) <= 1e-5 and result["buffers"] == 1, result

"""What `xdit-ir bench` takes and shows; the measuring itself needs GPUs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from xdit_ir.errors import XditError
from xdit_ir.planning.hardware import load
from xdit_ir.tools import bench_report, cmd_bench, estimate, scale
from xdit_ir.tools.cli import main
from xdit_ir.tools.contenders import Contender

ROOT = Path(__file__).parents[2]
SCALING = ROOT / "benchmarks" / "scaling"
RESULTS = [*sorted((ROOT / "benchmarks").glob("*.json")), *sorted((ROOT / "benchmarks").glob("*/published-h200.json"))]
DOCUMENT = {
    "model": "some-model",
    "gpu": "GPU",
    "ranks": 2,
    "torch": "2.11",
    "command": "xdit-ir bench some-model",
    "results": [
        {"contender": "alone:compiled", "median_ms": 100.0, "min_ms": 99.0, "max_ms": 101.0, "memory_gib": 1.0}
        | {"error": 1e-2, "first_call_s": 3.0, "communication_ms": 0.0},
        {"contender": "u2:graph", "median_ms": 50.0, "min_ms": 49.0, "max_ms": 51.0, "memory_gib": 1.0}
        | {"error": 1e-2, "first_call_s": 3.0, "communication_ms": 1.0},
        {"contender": "xdit-u2:compiled", "failure": "Unsupported: two\nlines"},
    ],
}


@pytest.mark.parametrize(
    "text",
    [
        "alone:compiled",
        "u2:graph",
        "c2u2:collective",
        "diffusers-u2:compiled",
        "xdit-u2:reduced",
        "r2:eager/peer@sdpa",
        "u2+sharded:graph@sdpa",
        "alone:reduced",
        "cachedit-u2:reduced",
    ],
)
def test_a_contender_prints_as_it_was_written(text: str) -> None:
    assert str(Contender.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "u2",
        "u2:fast",
        "u2:reduced",
        "other-u2:eager",
        "q2:eager",
        "",
        "u2:eager@fast",
        "xdit-u2:eager@cudnn",
        "u2:eager/fast",
        "alone:eager/peer",
        "alone+sharded:eager",
    ],
)
def test_what_is_no_contender_is_refused(text: str) -> None:
    with pytest.raises(XditError):
        Contender.parse(text)


def test_speed_up_is_over_one_compiled_gpu_and_failures_are_shown() -> None:
    rows = bench_report.rows(DOCUMENT)
    assert rows[1][:4] == ("u2:graph", "50.0", "49.0 to 51.0", "2.00")
    assert rows[2][1] == "failed: Unsupported: two lines"
    assert all(len(row) == len(bench_report.HEADER) for row in rows)


def test_a_contender_in_which_the_ranks_end_has_failed_and_the_others_are_left() -> None:
    good, bad = {"contender": "a", "median_ms": 1.0}, {"contender": "b", "failure": "Error: no"}
    assert cmd_bench.completed([good, bad], ["a", "b", "c"], 0) == [good, bad]
    assert cmd_bench.completed([good], ["a", "b", "c"], -9) == [
        good,
        {"contender": "b", "failure": "no result: the ranks ended with status -9"},
    ]
    assert cmd_bench.completed([good], ["a"], 1) == [good]


WORKER = """
import json, os, sys, time
left, out = sys.argv[1].split(","), sys.argv[2]
results = []
for one in left:
    if one == "hangs":
        time.sleep(60)
    if one == "dies":
        os._exit(7)
    results.append({"contender": one} | ({"failure": "Error: bad"} if one == "raises" else {"median_ms": 1.0}))
    with open(out, "w") as file:
        json.dump({"results": results}, file)
    if one == "raises":
        break
"""


def test_a_run_goes_on_behind_contenders_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they raise, end or hang."""
    real, out = cmd_bench._started, tmp_path / "out.json"

    def started(worker: list[str], out: Path, patience: float) -> tuple[int, dict[str, Any]]:
        left = worker[worker.index("--contenders") + 1].replace(":eager", "").replace("-u2", "")
        return real(["-c", WORKER.replace('"hangs"', '"u3"').replace('"dies"', '"u4"'), left, str(out)], out, 1.0)

    monkeypatch.setattr(cmd_bench, "_started", started)
    monkeypatch.setattr(cmd_bench, "_show", lambda document: None)
    wanted = [Contender.parse(text) for text in ("u2:eager", "u3:eager", "u2:eager", "u4:eager", "r2:eager")]
    args = Namespace(samples=1, burst=1, profile="", patience=1.0)
    assert cmd_bench._measure(args, "model", 2, wanted, out) == 0
    failed = ["failure" in one for one in json.loads(out.read_text())["results"]]
    assert failed == [False, True, False, True, False]


def test_the_page_is_made_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, page = tmp_path / "one.json", tmp_path / "page.md"
    source.write_text(json.dumps(DOCUMENT))
    assert main(["bench", str(source), "--page", str(page)]) == 0
    assert "| u2:graph | 50.0 |" in page.read_text()
    assert page.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_what_other_commands_told_is_one_table() -> None:
    def told(model: str, ranks: int, *results: dict[str, Any]) -> dict[str, Any]:
        return {"model": model, "gpu": "GPU", "ranks": ranks, "results": [*results]}

    alone = {"contender": "alone:compiled", "median_ms": 100.0}
    documents = [
        told(
            "second",
            2,
            alone,
            {"contender": "u2:graph", "median_ms": 50.0},
            {"contender": "c2:graph", "median_ms": 40.0},
        ),
        told("first", 2, {"contender": "u2:graph", "times": 0.625, "of": "alone:compiled"}),
        told("third", 1, alone, {"contender": "u1:graph", "median_ms": 300.0}),
    ]
    assert bench_report.published(documents) == [
        ("first", "2 x GPU", "", "u2:graph", "", "1.60"),
        ("second", "2 x GPU", "100.0", "c2:graph", "40.0", "2.50"),
        ("second", "2 x GPU", "100.0", "u2:graph", "50.0", "2.00"),
    ]
    assert "| second | 2 x GPU | 100.0 | c2:graph | 40.0 | 2.50 |" in bench_report.page(documents, "")


def test_the_page_in_docs_is_that_of_the_stored_results() -> None:
    from xdit_ir.tools.cmd_bench import HEAD

    made = bench_report.page(bench_report.read(RESULTS), HEAD)
    assert made == (ROOT / "docs" / "performance.md").read_text()


def test_wrong_usage_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "flux.1-dev", "--peers", "foo"]) == 2
    assert "diffusers, xdit" in capsys.readouterr().err
    assert main(["bench", "flux1-dev"]) == 2
    assert "nearest: flux.1-dev" in capsys.readouterr().err


def test_scaling_tries_every_way_to_use_the_gpus() -> None:
    assert scale.counts(8) == [2, 4, 8]
    assert list(map(str, scale.degree_sets(2))) == ["u2", "r2", "p2m2", "p2m4"]
    eight = list(map(str, scale.degree_sets(8)))
    assert set(eight) >= {"u8", "r8", "r2u4", "c2u4", "p2u4m2", "p4u2m8", "p8m8", "p8m16"}
    for gpus in (2, 4, 8):
        assert all(degrees.ranks == gpus for degrees in scale.degree_sets(gpus))
        assert [str(Contender.parse(text)) for text in scale.contenders(gpus)] == scale.contenders(gpus)
    with pytest.raises(XditError, match="nearest: 4"):
        scale.counts(6)


def test_the_best_of_each_kind_is_drawn_against_the_gpus(tmp_path: Path) -> None:
    four = DOCUMENT | {"ranks": 4, "results": [DOCUMENT["results"][0], {"contender": "u4:graph", "median_ms": 25.0}]}  # type: ignore[index]
    assert scale.speed_ups([DOCUMENT, four]) == {"some-model": {"u": {2: 2.0, 4: 4.0}}}
    scale.plot([DOCUMENT, four], tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text().lstrip().startswith("<?xml")


def test_what_scaling_would_be_worked_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, out = tmp_path / "scaling.md", tmp_path / "rows"
    command = ["bench", "pixart-sigma", "--scale", "--estimate", "--gpus", "4", "--page", str(page), "--out", str(out)]
    assert main(command) == 0
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows if len(row) > 6][1:] == ["u1", "u4", "r2u2", "p2u2m4"]
    assert 1 < float(rows[1][-1].strip(" |")) <= 4.01, "the speed-up of the fastest"
    assert "pixart-sigma, milliseconds of a step" in capsys.readouterr().out

    made = json.loads((out / "pixart-sigma.json").read_text())
    made["rows"][1]["ms"] = 1.25
    (out / "pixart-sigma.json").write_text(json.dumps(made))
    assert main(command) == 0 and "**1.2**" in page.read_text(), "what is there is not worked out again"
    assert main([*command, "--machine", "a100"]) == 2 and "is of h100, not of a100" in capsys.readouterr().err
    assert main(["bench", "pixart-sigma", "--estimate"]) == 2


def test_the_page_of_scaling_is_what_was_worked_out() -> None:
    made = [(name, estimate.worked_out(name, 4, load("h100-infiniband"), SCALING)) for name in estimate.CALLS]
    text = (ROOT / "docs" / "scaling.md").read_text()
    command = next(line.strip() for line in text.splitlines() if line.startswith("    xdit-ir"))
    assert estimate.page(made, load("h100-infiniband"), command) == text


def test_what_planning_says_of_scaling() -> None:
    """The sentences of docs/planning.md on several nodes."""
    ms = {}
    for name in estimate.CALLS:
        rows = estimate.worked_out(name, 4, load("h100-infiniband"), SCALING)
        ms |= {(name.partition("-")[0], row.degrees): row.ms for row in rows}
    assert all(ms[name, "u8"] < ms[name, "r2u4"] for name in ("flux.2", "qwen", "wan2.1"))
    assert 0.95 < ms["flux.2", "u16"] / ms["flux.2", "r2u8"] < 1.05 and ms["flux.2", "u32"] < ms["flux.2", "r4u8"]
    assert ms["wan2.1", "r2u8"] < 0.82 * ms["wan2.1", "u16"] and ms["wan2.1", "r4u8"] < 0.67 * ms["wan2.1", "u32"]
    assert ms["qwen", "u32"] < 0.95 * ms["qwen", "r4u8"] and ms["qwen", "u64"] < 0.95 * ms["qwen", "r8u8"], "tiles"
    assert 0.95 < ms["flux.2", "u64"] / ms["flux.2", "r8u8"] < 1.05
    assert ms["flux.2", "p2u8m4"] > ms["flux.2", "r2u8"] and ms["flux.2", "p4u8m4"] < 0.8 * ms["flux.2", "u32"]
    assert ms["qwen", "u16"] < ms["qwen", "p4u8m4"] * 2 and ms["wan2.1", "u8"] < 2 * ms["wan2.1", "r2u8"]


def test_more_gpus_than_there_are_is_told_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(XditError, match="--gpus 2: this machine has 1; nearest legal: --gpus 1"):
        cmd_bench.check_gpus(2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(XditError, match="--gpus 2: this machine has 0; nearest legal: `xdit-ir plan`"):
        cmd_bench.check_gpus(2)

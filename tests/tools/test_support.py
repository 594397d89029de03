"""`xdit-ir support`: what it measures, that it resumes, that it works with several processes, and what it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from xdit_ir import models
from xdit_ir.tools import cmd_support
from xdit_ir.tools.cli import main
from xdit_ir.tools.support_page import page
from xdit_ir.tools.survey import DEGREES, Outcome, Survey, survey

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


@pytest.fixture(scope="module")
def packed() -> Survey:
    return survey("plain-packed-dit")


def test_survey(packed: Survey) -> None:
    assert [one.degrees for one in packed.outcomes] == [str(one) for one in DEGREES]
    found = packed.outcome("u4")
    assert found.exact and 0 < found.error <= 1e-5
    assert 0.25 <= found.slowest < 0.26 and 1.0 <= found.work < 1.01
    assert found.bytes > 0 and found.gathers == found.gathered == ()
    assert all(one.exact for one in packed.outcomes)
    assert Survey.from_json(json.loads(json.dumps(packed.as_json()))) == packed


def test_survey_says_why_degrees_are_illegal() -> None:
    found = survey("cosmos3-omni", [one for one in DEGREES if one.as_dict().get("cfg") == 2]).outcome("c2")
    assert "batch of 1" in found.refused and not found.exact


def test_survey_names_what_is_gathered_inside_a_block() -> None:
    found = survey("nucleus-image", DEGREES[:1]).outcome("u2")
    assert any(place.startswith("topk, NucleusMoEImageTransformerBlock") for place in found.gathered)
    assert set(found.gathered) <= set(found.fallbacks)
    assert len(found.gathers) >= 3


def test_survey_counts_gathers_of_keys() -> None:
    """The audio stream of each block is what its video attends to."""
    found = survey("kandinsky-6", DEGREES[2:3]).outcome("u4")
    assert found.gathered == ()
    assert len(found.gathers) == 2 and all(place.startswith("attention: ") for place in found.gathers)


def test_page_has_every_reason(packed: Survey) -> None:
    refused = replace(
        packed,
        outcomes=[
            replace(one, refused="cfg=2 divides the batch") if one.degrees == "c2" else one for one in packed.outcomes
        ],
    )
    bad = Outcome("u4", error=0.5, slowest=0.7, work=2.8, gathers=("topk: B x\ny",), fallbacks=("sort, y: no",))
    text = page(
        [refused, Survey("dual-transformer", outcomes=(bad,)), Survey("mochi-1", not_captured="reads | a value")]
    )
    assert "2 of 3 models captured" in text and "5 of 6 simulations" in text
    assert "| plain-packed-dit | `PackedDiT` | ≤ 1e-06 | 0 | refused | 0.251, 1.00, 0 gathered" in text
    assert (
        "| dual-transformer | `DualTransformer2DModel` | **5e-01** | 1 | - | 0.700, 2.80, 0 gathered, 0.00 MiB |"
        in text
    )
    assert "| mochi-1 | `MochiTransformer3DModel` | not captured | - | - | - | - | - |" in text
    for line in (
        "* mochi-1: `reads / a value`",
        "* plain-packed-dit, c2: `cfg=2 divides",
        "* dual-transformer: 0.700, 2.80",
        "* dual-transformer: `topk: B x y`",
        "* dual-transformer: `sort, y: no`",
        "* dual-transformer: a part of a U-Net",
    ):
        assert f"\n{line}" in text


def test_page_of_parts() -> None:
    noisy = Outcome("u4", error=math.nan, slowest=0.25)
    parts = [
        survey("tiny decode"),
        Survey("kl decode", outcomes=(replace(noisy, degrees="u2"), noisy)),
        Survey("t5 forward", not_captured="reads values"),
    ]
    text = page(parts)
    assert "3 calls, 2 captured; 2 of 2 simulations within 1e-05; 2 draw noise and are not compared" in text
    assert "| tiny decode | `AutoencoderTiny` | ≤ 1e-06 | 0.509, 1.02, 0 gathered" in text
    assert "| kl decode | `AutoencoderKL` | draws noise | 0.250" in text and "* t5 forward: `reads values`" in text


def test_an_interrupted_run_goes_on(tmp_path: Path, packed: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops_at_the_second(name: str) -> Survey:
        if name != "plain-packed-dit":
            raise KeyboardInterrupt
        return packed

    argv = ["support", "plain-packed-dit", "plain-uvit", "--cache", str(tmp_path / "cache")]
    monkeypatch.setattr(cmd_support, "survey", stops_at_the_second)
    assert main(argv) == 130, "as of a program that Ctrl-C ended"
    asked: list[str] = []
    monkeypatch.setattr(cmd_support, "survey", lambda name: asked.append(name) or Survey(name, "not today"))
    assert main([*argv, "--output", str(tmp_path / "page.md")]) == 0
    assert asked == ["plain-uvit"]
    text = (tmp_path / "page.md").read_text()
    assert "| plain-packed-dit |" in text and "* plain-uvit: `not today`" in text
    monkeypatch.setattr(cmd_support, "digest", lambda: "other sources")
    assert main(argv) == 0
    assert asked == ["plain-uvit", "plain-packed-dit", "plain-uvit"]


def test_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "kandinsky-2.2-prior", "plain-dit", "--jobs", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| model", "| kandinsky-2.2-prior", "| plain-dit"]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["support", "plain-dot"]) == 2
    assert "nearest: plain-dit" in capsys.readouterr().err
    assert main(["support", "--jobs", "0"]) == 2
    assert "nearest legal one is 1" in capsys.readouterr().err


def test_the_page_is_of_this_zoo() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    named = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert named == [*models.names(), "part", *models.part_calls()]


def test_a_column_of_what_ran_on_gpus(packed: Survey, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Degrees by what became of them; of a model that was not run, nothing."""
    ran = [
        {"model": packed.name, "degrees": "u2", "status": "equal", "error": 1e-6, "seconds": 2.0},
        {"model": packed.name, "degrees": "c2", "status": "equal", "error": 1e-6, "seconds": 2.0},
        {"model": packed.name, "degrees": "p2", "status": "refused", "reason": "samples | begin elsewhere"},
        {"model": packed.name, "degrees": "r2", "status": "different", "error": 0.5, "seconds": 2.0},
    ]
    text = page([packed, replace(packed, name="dit-xl-2-256")], ran)
    header, _, row, other = [line for line in text.splitlines() if line.startswith("|")][:4]
    columns = [cell.strip() for cell in header.split("|")]
    cells, others = ([cell.strip() for cell in line.split("|")] for line in (row, other))
    assert len(cells) == len(columns) and cells[columns.index("on GPUs")] == "c2 u2, p2 refused, r2 **different**"
    assert others[columns.index("on GPUs")] == "-"
    assert "* 2 of 3 runs on GPUs equal to the model alone; 1 refused." in text
    assert f"* {packed.name}, p2: `samples / begin elsewhere`" in text and "differs by 5.0e-01" in text
    assert "on GPUs" not in page([packed])
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps([{"contender": "u2"}]))
    assert main(["support", packed.name, "--gpu", str(wrong)]) == 2
    assert "tests/gpu/zoo.py" in capsys.readouterr().err

"""Every command: what it prints, its exit status, and what it says when it is used wrongly."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from xdit_ir import models
from xdit_ir.checking.check import CheckResult
from xdit_ir.checking.divergence import Divergence
from xdit_ir.simulation import lockstep as simulate
from xdit_ir.tools import cli, cmd_check
from xdit_ir.tools.cli import main

TINY = "flux.1-dev:tiny"
Capture = pytest.CaptureFixture[str]

TARGETS = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(2))
        self.heads = nn.Linear(8, 24)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def build():
    return Model(), {"x": torch.randn(2, 12, 8)}

def on_meta():
    return Model().to("meta"), {"x": torch.randn(2, 12, 8)}

def broken():
    raise ValueError("no weights today")

def no_model():
    return Model()

not_callable = 3
"""


def fails(capsys: Capture, *argv: str) -> str:
    """Standard error of a command that must exit with 2, without a traceback and without other output."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out == ""
    return re.sub(r"\s+", " ", err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets")
    (path / "cli_targets.py").write_text(TARGETS)
    (path / "cli_imports_nothing.py").write_text("import no_such_package_at_all\n")
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_models_are_listed_with_their_sizes(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tiny = next(name for name in models.names() if models.entry(name).full is None)
    monkeypatch.setattr(models, "names", lambda: ["flux.1-dev", only_tiny])
    assert main(["models"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    flux, other = ([cell.strip() for cell in row[1:4]] for row in rows)
    assert flux == ["flux.1-dev", "FluxTransformer2DModel", "11.90 billion"]
    assert other == [only_tiny, models.entry(only_tiny).cls, "only :tiny"]


def test_inspect_full_size_without_memory(capsys: Capture) -> None:
    assert main(["inspect", "flux.1-dev", "--ulysses", "2"]) == 0
    out, err = capsys.readouterr()
    before, after, report = re.split(r"(?m)^# .*flux\.1-dev.*$", out)[1:]
    assert before.count("FluxSingleTransformerBlock<") == after.count("FluxSingleTransformerBlock<") == 38
    assert "bf16[1, 4096, 3072]" in before and "ulysses" not in before
    assert "bf16[1, 4096/ulysses, 3072]" in after
    assert "74.38 TFLOP" in report and "all_to_all" in report
    assert err == ""


def test_inspect_without_degrees_prints_the_program_once(capsys: Capture) -> None:
    assert main(["inspect", TINY]) == 0
    out = capsys.readouterr().out
    assert out.count("program ") == 1 and "report" not in out


def test_inspect_one_block_after_each_pass(capsys: Capture) -> None:
    assert main(["inspect", TINY, "--ulysses", "2", "--passes", "--block", "FluxTransformerBlock"]) == 0
    out = capsys.readouterr().out
    titles = re.findall(r"(?m)^# (.*)$", out)
    assert titles[0] == TINY and titles[-1].startswith("report")
    passes = ["canonicalize", "find-tokens", "split-batch", "shard-tokens", "replicate-shared", "propagate-layouts"]
    passes += ["lower-attention", "specialize", "fuse-gelu", "choose-kernels", "use-copy-engines"]
    assert [title for title in titles if title.removeprefix("after ") in passes] == [f"after {p}" for p in passes]
    assert out.count("block FluxTransformerBlock(") == len(titles) - 1
    assert "block FluxSingleTransformerBlock(" not in out
    assert "scaled_dot_product_attention(" in out and "= all_to_all(" in out and "= all_to_all_by_copies(" in out


def test_inspect_shows_what_a_rank_runs_on_other_devices(capsys: Capture) -> None:
    """Kernels are chosen for the GPU that is described; on the CPU a rank's program runs as it is."""
    args = ["inspect", TINY, "--dtype", "bfloat16", "--ring", "2", "--passes", "--block", "FluxTransformerBlock"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "= linear_gelu(" in out and "= ring_attention[cudnn](" in out
    assert main([*args, "--gpu", "8.0"]) == 0
    assert "= ring_attention[flash](" in capsys.readouterr().out
    assert main([*args, "--gpu", "none"]) == 0
    out = capsys.readouterr().out
    assert "# after specialize" in out and "# after fuse-gelu" not in out


def test_inspect_shows_what_a_stage_runs(capsys: Capture) -> None:
    assert main(["inspect", TINY, "--dtype", "bfloat16", "--pipefusion", "2", "--passes"]) == 0
    out = capsys.readouterr().out
    assert "# after partition-stages" in out and "# after displace-patches" in out and "# after choose-kernels" in out


def test_inspect_bodies_to_a_file(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "program.txt"
    assert main(["inspect", TINY, "--ring", "2", "--bodies", "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    assert "= ring_attention(" in text and text.count("block FluxTransformerBlock(") == 2


def test_inspect_only_the_report(capsys: Capture) -> None:
    assert main(["inspect", TINY, "--cfg", "2", "--report"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# report") and "program" not in out and "gather" in out


def test_inspect_a_function(capsys: Capture, here: Path) -> None:
    assert main(["inspect", "cli_targets:on_meta", "--ulysses", "2"]) == 0
    assert "f32[2, 12/ulysses, 8]" in capsys.readouterr().out


def test_check_table_and_status(capsys: Capture) -> None:
    assert main(["check", TINY, "--degrees", "u2,c2r2"]) == 0
    out, err = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [(row[0], row[1], row[4], row[6]) for row in rows] == [
        ("u2", "2", "0", "equal"),
        ("c2r2", "4", "0", "equal"),
    ]
    for _, ranks, error, share, _, sent, _ in rows:
        assert float(error) < 1e-5 and float(sent) > 0
        assert float(share) == pytest.approx(1 / int(ranks), rel=0.05)
    assert err == ""


def test_hidden_text_is_left_out(capsys: Capture) -> None:
    """By `check`, which compares with the model, and by `inspect`, whose report has fewer FLOPs."""
    model, trim = "kind-masked-text:tiny", ["--trim-padding", "64"]
    assert main(["check", model, "--degrees", "u2", *trim]) == 0
    assert "1.0000" not in capsys.readouterr().out
    shares = []
    for given in ([], trim):
        assert main(["inspect", model, "--ulysses", "2", "--report", *given]) == 0
        shares.append(float(re.findall(r"slowest of 2 ranks does ([\d.]+)", capsys.readouterr().out)[0]))
    assert shares[1] < 0.6 * shares[0]
    assert main(["inspect", model, "--passes", *trim]) == 0
    assert "# after trim-padding" in capsys.readouterr().out
    assert main(["inspect", model, "--trim-padding", "0"]) == 2
    assert "trim_padding=0" in capsys.readouterr().err


def test_check_a_function(capsys: Capture, here: Path) -> None:
    assert main(["check", "cli_targets:build", "--degrees", "u2"]) == 0
    assert "equal" in capsys.readouterr().out


def test_check_refused_degrees_are_explained_and_the_others_checked(capsys: Capture) -> None:
    assert main(["check", TINY, "--degrees", "c3,u2"]) == 2
    out, err = capsys.readouterr()
    assert "refused" in out and "equal" in out
    assert re.search(r"c3: cfg=3 .* cfg=2", err)


def test_check_writes_what_servers_read(capsys: Capture, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one's own with a rank that is wrong: a failure in the report, an annotation at the model's line."""
    right = simulate.unpack
    monkeypatch.setattr(simulate, "unpack", lambda pieces, exchange: 2 * right(pieces, exchange))
    assert main(["check", "cli_targets:build", "--degrees", "u2,r2,c3", "--junit", "out.xml", "--github"]) == 1
    out = capsys.readouterr().out
    suite = ElementTree.parse(here / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "2", "1")
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    failure = cases["u2"].find("failure")
    assert failure is not None and failure.text is not None
    assert "DIFFERENT" in failure.attrib["message"] and "expected float32[" in failure.text
    assert cases["c3"].find("error") is not None
    commands = [line for line in out.splitlines() if line.startswith("::error ")]
    line = next(n for n, text in enumerate(TARGETS.splitlines(), 1) if "self.heads(x)" in text)
    assert len(commands) == 3
    assert commands[0].startswith(f"::error file=cli_targets.py,line={line},title=xdit-ir check cli_targets%3Abuild u2")
    assert "%0A" in commands[0]


def test_check_fails_above_a_limit(capsys: Capture, here: Path) -> None:
    """A third for each of three ranks is below the limit, a half for each of two is not."""
    argv = ["check", "cli_targets:build", "--degrees", "u3,u2", "--max-share", "0.4"]
    assert main([*argv, "--junit", "out.xml", "--github"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"u3 .*equal", out) and re.search(r"u2 .*COSTLY", out)
    said = "the slowest rank does 0.5000 of the FLOPs, above 0.4 (0.5000 is fair)"
    assert f"u2: {said}" in out and f"u2%3A COSTLY::{said}" in out
    [failure] = ElementTree.parse(here / "out.xml").getroot().iter("failure")
    assert failure.attrib["message"] == said
    assert main([*argv[:3], "u2", "--max-share", "0.5", "--max-fallbacks", "0"]) == 0


def test_check_cannot_write(capsys: Capture, here: Path) -> None:
    assert main(["check", "cli_targets:build", "--degrees", "u2", "--junit", "no/such/folder.xml"]) == 2
    assert "cannot write no/such/folder.xml" in capsys.readouterr().err


def test_check_difference_names_the_place(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Divergence("blocks.3", "linear_2", "model.py:7: y = self.proj(x)", 1, 0.5)
    wrong = CheckResult(False, 0.25, 1e-5, 2, place)
    monkeypatch.setattr(cmd_check, "check_parallel", lambda *args, **kwargs: wrong)
    assert main(["check", TINY, "--degrees", "u2"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT" in out and "blocks.3, linear_2 on rank 1" in out and "model.py:7" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check", "flux.1-dev"], "check flux.1-dev:tiny"),
        (["check", TINY, "--degrees", "2u"], "nearest legal form is 'u2'"),
        (["check", TINY, "--max-share", "55"], "max_share=55.0 is no part of a forward"),
        (["check", TINY, "--max-fallbacks", "-1"], "max_fallbacks=-1 is no number of fallbacks; the smallest is 0"),
        (["check", "cli_targets:on_meta"], "on the meta device; check needs real weights"),
        (["inspect", "flux.1-def"], "nearest: flux.1-dev"),
        (["inspect", "flux.1-dev:big"], "nearest: flux.1-dev"),
        (["inspect", TINY, "--ulysses", "0"], "nearest legal one is ulysses=1"),
        (["inspect", TINY, "--cfg", "3"], "cfg=2"),
        (["inspect", TINY, "--block", "FluxBlock"], "nearest: FluxTransformerBlock"),
        (["inspect", "no_such_module:build"], "there is no module 'no_such_module'"),
        (
            ["inspect", "cli_imports_nothing:build"],
            "importing cli_imports_nothing raised ModuleNotFoundError",
        ),
        (["inspect", "cli_targets:absent"], "has no function absent"),
        (["inspect", "cli_targets:not_callable"], "has no function not_callable"),
        (["inspect", "cli_targets:no_model"], "should return (model, example)"),
        (["inspect", "cli_targets:broken"], "raised ValueError: no weights today"),
        (["inspect", TINY, "--output", "no/such/folder/file"], "cannot write no/such/folder/file"),
        (["inspect"], "required: MODEL"),
        (["insect"], "invalid choice: 'insect'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_usage(capsys: Capture, here: Path, argv: list[str], said: str) -> None:
    assert said in fails(capsys, *argv)


def test_errors_name_the_line_of_the_users_file(capsys: Capture, here: Path) -> None:
    line = TARGETS.splitlines().index('    raise ValueError("no weights today")') + 1
    assert f"cli_targets.py:{line})" in fails(capsys, "inspect", "cli_targets:broken")


def test_module_is_runnable_and_help_exits_with_0(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["xdit-ir", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(cli.__file__), run_name="__main__")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("inspect", "check", "models"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "plan plain-dit:tiny --ulises 2",
            "xdit-ir plan: error: unrecognized arguments: --ulises 2; did you mean --ulysses?",
        ),
        ("inspect plain-dit:tiny --device nowhere", "--device nowhere: expected one that PyTorch has, such as meta"),
        ("inspect plain-dit:tiny --gpu nine", "'nine' is no compute capability: expected one such as 9.0, or none"),
        ("bench flux.1-dev --gpus 0", "--gpus 0: expected a positive number, such as 2"),
        ("serve /tmp --port 99999999", "--port 99999999: expected 1 to 65535, such as 8000"),
        ("plan plain-dit:tiny --memory lots", "memory='lots': expected GiB that a GPU may use, such as 80"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err

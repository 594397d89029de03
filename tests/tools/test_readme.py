"""What README.md says is true: its code runs, its commands work, its excerpt is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from xdit_ir.tools.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MARKED = re.compile(r"<!-- ([^>]*) -->\n```\w+\n(.*?)```", re.DOTALL)
BLOCKS = dict(MARKED.findall(README))
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PRINTED = next(mark.removeprefix("printed by: ") for mark in BLOCKS if mark.startswith("printed by: "))
# What is printed is compared below; making all models to list them takes long, and `test_cli.py` lists two.
ELSEWHERE = {f"xdit-ir {PRINTED}", "xdit-ir models"}
COMMANDS = [line for line in SHELL if line.startswith("xdit-ir ") and "GPUs" not in line and line not in ELSEWHERE]


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS["testable"], "README.md", "exec"), {"__name__": "readme"})
    out = capsys.readouterr().out
    assert "on ring=2 ulysses=2" in out and "equal: 4 ranks" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymodel.py").write_text(BLOCKS["testable: mymodel.py"])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0


def test_excerpt_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(PRINTED)) == 0
    printed = capsys.readouterr().out.splitlines()
    excerpt = [line for line in BLOCKS[f"printed by: {PRINTED}"].splitlines() if line.strip() != "[...]"]
    assert len(excerpt) >= 5 and [line for line in excerpt if line not in printed] == []
    for fact in re.findall(r"does (0\.\d+) of|sends (\d+) MiB|in (\d+) all-to-alls", README):
        assert any("".join(fact) in line for line in printed), fact


def test_inline_commands_and_targets_exist() -> None:
    targets = {target for line in SHELL for target in re.findall(r"^make (\w+)", line)}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets)


def test_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []

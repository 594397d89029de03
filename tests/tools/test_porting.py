"""docs/porting.md, from beginning to end: its files, its code, its commands, and what it says they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from xdit_ir.tools.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "porting.md").read_text()
FENCED = re.compile(r"(?:<!-- ([^>]*) -->\n)?```\w*\n(.*?)```", re.DOTALL)
BLOCKS: list[tuple[str, str]] = FENCED.findall(TEXT)


def shell(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a command of the page prints."""
    program, *arguments = shlex.split(command)
    if program == "xdit-ir":
        assert main(arguments) == 0
        return capfd.readouterr().out
    assert program == "torchrun"
    run = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(text: str, diff: str) -> str:
    """A file with the lines of a diff replaced."""
    before, after = ([line[1:] for line in diff.splitlines() if line[0] == sign] for sign in "-+")
    for old, new in zip(before, after, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_every_block_is_marked() -> None:
    kinds = {mark.partition(":")[0] for mark, _ in BLOCKS}
    assert kinds == {"file", "run", "prints", "shell", "change"}
    assert "xir.port(" in TEXT and "torchrun" in TEXT


def test_the_page_from_beginning_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, Any] = {"__name__": "porting"}
    printed = ""
    for mark, block in BLOCKS:
        kind, _, name = mark.partition(": ")
        if kind == "file":
            (tmp_path / name).write_text(block)
        elif kind == "change":
            (tmp_path / name).write_text(changed((tmp_path / name).read_text(), block))
            os.utime(tmp_path / name, (time.time() + 2, time.time() + 2))  # or the old bytecode would do
        elif kind == "run":
            exec(compile(block, "porting.md", "exec"), space)
            printed = capfd.readouterr().out
        elif kind == "shell":
            printed = "".join(shell(line, capfd) for line in block.splitlines())
        else:
            wanted = [line for line in block.splitlines() if line.strip() != "[...]"]
            assert [line for line in wanted if line not in printed.splitlines()] == []
    sys.modules.pop("mydit", None)


def test_links_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        headings = re.findall(r"(?m)^#+ (.*)$", (ROOT / "docs" / path).read_text())
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]

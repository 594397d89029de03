"""Pages of docs/ from beginning to end: their files, their code, their commands, and what they say these print."""

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

from xdit_ir.tools.cli import _parser, main

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("porting", "operators", "checking", "planning")}
FENCED = re.compile(r"(?:<!-- ([^>]*) -->\n)?```\w*\n(.*?)```", re.DOTALL)
# `prints`: these lines are printed; `shows`: these are parts of lines that are printed, in this order.
KINDS = {"file", "run", "prints", "shows", "shell", "change"}


def shell(command: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a command of the page prints."""
    program, *arguments = shlex.split(command)
    if program == "xdit-ir":
        assert main(arguments) == 0
        return capfd.readouterr().out
    module = {"torchrun": ["torch.distributed.run"], "pytest": ["pytest", "-p", "xdit_ir.pytest_plugin"]}[program]
    settings = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = [sys.executable, "-m", *module, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(text: str, diff: str) -> str:
    """A file with the lines that a diff removes, which follow each other, replaced by those that it adds."""
    old, new = ("".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] == sign) for sign in "-+")
    assert text.count(old) == 1
    return text.replace(old, new)


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page, with the comment that marks each."""
    found: list[tuple[str, str]] = FENCED.findall(PAGES[page])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_marked(page: str) -> None:
    assert {mark.partition(":")[0] for mark, _ in blocks(page)} <= KINDS


def test_porting_ends_with_running() -> None:
    assert "xir.port(" in PAGES["porting"] and "torchrun" in PAGES["porting"]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_from_beginning_to_end(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if page == "checking" and not request.config.getoption("--large"):
        pytest.skip("needs --large: it starts pytest and checks a dozen sets of degrees")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, Any] = {"__name__": page}
    printed, written = "", 0
    for mark, block in blocks(page):
        kind, _, name = mark.partition(": ")
        if kind == "file":
            (tmp_path / name).write_text(block)
        elif kind == "change":
            (tmp_path / name).write_text(changed((tmp_path / name).read_text(), block))
            written += 2
            os.utime(tmp_path / name, (time.time() + written,) * 2)  # or the old bytecode would do
            sys.modules.pop(Path(name).stem, None)
        elif kind == "run":
            exec(compile(block, f"{page}.md", "exec"), space)
            printed = capfd.readouterr().out
        elif kind == "shell":
            printed = "".join(shell(line, capfd) for line in block.splitlines())
        else:
            compare(kind, [line for line in block.splitlines() if line.strip() != "[...]"], printed)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def compare(kind: str, wanted: list[str], printed: str) -> None:
    """What a page says is printed, with what is."""
    if kind == "prints":
        assert [line for line in wanted if line not in printed.splitlines()] == []
        return
    rest = iter(printed.splitlines())
    for part in wanted:
        assert any(part.strip() in line for line in rest), f"{part!r} is not there, or not in this order:\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        text = (ROOT / "docs" / path).read_text()
        headings = re.findall(r"(?m)^#+ (.*)$", text)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_example_workflow_checks_and_reports() -> None:
    """What it calls exists: its options are the command's."""
    text = (ROOT / "docs" / "examples" / "check.yml").read_text()
    [command] = re.findall(r"run: xdit-ir (check .*)", text)
    args = _parser().parse_args(shlex.split(command))
    assert args.github and str(args.junit) in text.replace(command, "")

"""`passes` and `opt`, and the pass that docs/writing_passes.md works out: what it says is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import FunctionType

import pytest

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.order import PASSES, rank_passes
from xdit_ir.passes.registry import describe, parse_passes
from xdit_ir.passes.use_copy_engines import UseCopyEngines
from xdit_ir.text import difference, load
from xdit_ir.tools.cli import main

Capture = pytest.CaptureFixture[str]
DOC = (Path(__file__).parents[2] / "docs" / "writing_passes.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", DOC, re.DOTALL)
MESH_PASSES = (
    "split-batch{ulysses=2},shard-tokens,replicate-shared,propagate-layouts,"
    "lower-attention,split-statistics,order-exchanges,split-joins,overlap"
)
RANK_PASSES = (
    "specialize{rank=1},write-in-place,fuse-gelu,choose-kernels{capability=8.0 recorded=true},use-copy-engines"
)
ANALYSIS = "canonicalize,take-known,compose-attention,group-keys,find-tokens"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page."""
    [code, text] = [next(body for kind, body in BLOCKS if kind == wanted) for wanted in ("python", "")]
    (tmp_path / "my_passes.py").write_text(code)
    (tmp_path / "scales.ir").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_worked_pass_does_what_the_page_shows(here: Path, capsys: Capture) -> None:
    assert main(["opt", "scales.ir", "--passes", "my_passes:FoldScales", "--diff"]) == 0
    shown = next(body for kind, body in BLOCKS if kind == "diff")
    assert capsys.readouterr().out == shown


def test_the_worked_test_passes(here: Path) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[-1][1], names)
    tests = [item for name, item in names.items() if name.startswith("test_") and isinstance(item, FunctionType)]
    assert len(tests) == 1
    tests[0]()


def test_the_commands_of_the_page(here: Path, capsys: Capture) -> None:
    """All of them run, on a whole model too; attention is lowered in the last one."""
    commands = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "xdit-ir" and main(arguments) == 0
    assert "= all_to_all(" in capsys.readouterr().out.partition("// after lower-attention")[2]


def test_a_model_from_text_to_ranks(here: Path, capsys: Capture) -> None:
    """The same as `parallelize`, by the names of its passes."""
    assert main(["inspect", "flux.1-dev:tiny", "--device", "cpu", "--ir", "flux.ir"]) == 0
    assert main(["opt", "flux.ir", "--passes", f"{ANALYSIS},{MESH_PASSES}", "--output", "u2.ir"]) == 0
    assert capsys.readouterr().out == "wrote flux.ir\nwrote u2.ir\n"
    direct = xir.trace(*models.load("flux.1-dev:tiny")).parallelize(ulysses=2)
    assert difference(load("u2.ir"), direct.ir) is None
    assert main(["opt", "u2.ir"]) == 0
    assert capsys.readouterr().out == Path("u2.ir").read_text()
    assert main(["opt", "u2.ir", "--passes", RANK_PASSES, "--output", "rank1.ir"]) == 0
    lowered = run_passes(direct.rank(1), [*rank_passes((8, 0), recorded=True), UseCopyEngines()])
    assert difference(load("rank1.ir"), lowered) is None
    capsys.readouterr()
    assert main(["opt", "flux.ir", "--passes", "canonicalize,find-tokens", "--print-after-all"]) == 0
    assert re.findall("// after (.*)", capsys.readouterr().out) == ["canonicalize", "find-tokens"]


def test_passes_are_listed(capsys: Capture) -> None:
    assert main(["passes"]) == 0
    out = capsys.readouterr().out
    assert [kind.name for kind in PASSES if kind.name not in out] == []
    one = describe(PASSES[0])
    assert (one.numerics, one.requires, one.provides) == ("reassociated", (), ("canonical",)) and one.does
    assert "Needs: tokens" in out and "Gives: seeds" in out


def test_options(here: Path) -> None:
    [step] = parse_passes("overlap{ulysses=2, ring=3 latency=1e-6}")
    made = step.make()
    assert made.mesh == Mesh.of(ulysses=2, ring=3) and made.machine.latency == 1e-6  # type: ignore[attr-defined]
    [step] = parse_passes("partition-stages{count=2 stages=3+1}")
    assert step.make().stages == (3, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ("shard-token", "no pass 'shard-token'; did you mean shard-tokens?"),
        (
            "shard-tokens",
            "needs a mesh, and neither a pass before it nor the program has one; give degrees,",
        ),
        ("shard-tokens{ulises=2}", "no option 'ulises'; did you mean ulysses?"),
        ("shard-tokens{ulysses=two}", "option ulysses=two: expected int"),
        ("shard-tokens{ulysses}", "expected option=value, got 'ulysses'"),
        ("shard-tokens{ulysses=2", "expected a list such as"),
        ("partition-stages", "missing 1 required positional argument: 'count'"),
        ("no_module:Pass", "No module named 'no_module'"),
        ("my_passes:is_scaling", "is no pass: a dataclass with a field `name` and a method `apply`"),
    ],
)
def test_mistakes_are_explained(here: Path, capsys: Capture, passes: str, said: str) -> None:
    assert main(["opt", "scales.ir", "--passes", passes]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_a_wrong_file_names_the_line(here: Path, capsys: Capture) -> None:
    (here / "wrong.ir").write_text((here / "scales.ir").read_text().replace("mul.Tensor(%t,", "mul.Tensor(%x,"))
    assert main(["opt", "wrong.ir"]) == 2
    assert "wrong.ir: line 3, column 31: expected a value that stands before this line" in capsys.readouterr().err
    assert main(["opt", "absent.ir"]) == 2
    assert "cannot read absent.ir" in capsys.readouterr().err


BREAKING = """
from dataclasses import dataclass
from xdit_ir.ir.graphs import map_graphs
from xdit_ir.ir.program import SPEC

@dataclass(frozen=True)
class Forget:
    name: str = "forget"

    def apply(self, program):
        return map_graphs(program, lambda graph: [node.meta.pop(SPEC, None) for node in graph.nodes])
"""


def test_a_pass_that_breaks_a_program_is_named(here: Path, capsys: Capture) -> None:
    (here / "breaking.py").write_text(BREAKING)
    assert main(["opt", "scales.ir", "--passes", "breaking:Forget"]) == 2
    assert "after forget, outer graph, t: has no type" in capsys.readouterr().err

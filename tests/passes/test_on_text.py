"""Passes on texts by hand: tests/golden/passes/PASS.ir goes in, and what stands in PASS.out.ir comes out.

Comments of a case say what to see, and

    // run: find-tokens,shard-tokens{ulysses=2}
    // installed: flash_attn_interface

which passes run, of which the last is the one that the case is about (each such line begins with the text anew), and
which kernels there are. `pytest --update-golden` rewrites the outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverload

from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import all_graphs, copy_graph
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.kernels import backends
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.order import PASSES
from xdit_ir.passes.registry import apply_passes, parse_passes
from xdit_ir.sharding.verify import verify
from xdit_ir.text import difference, parse, write

Golden = Callable[[str, str], None]
CASES = sorted(
    path for path in Path(__file__).parents[1].glob("golden/passes/*.ir") if not path.name.endswith(".out.ir")
)


def said(text: str, word: str) -> list[str]:
    """What stands behind a word in the comments of a case."""
    return re.findall(rf"(?m)^// {word}: (.*)$", text)


def shown(path: Path) -> str:
    """The pass that a case is about; `PASS.what.ir` is a further case of it."""
    return path.name.split(".")[0]


def test_every_pass_has_a_case() -> None:
    assert {shown(path) for path in CASES} == {kind.name for kind in PASSES}


def check(program: Program, name: str) -> None:
    """The verifier, and that every operator gives what stands there."""
    verify(program, name, runnable=Fact.RUNNABLE in program.facts)
    for _, graph, _ in all_graphs(program):
        for node in (node for node in graph.nodes if isinstance(node.target, OpOverload)):
            if node.target is torch.ops.aten.index.Tensor:
                continue  # as many results as a mask is true
            [copy] = (one for one in copy_graph(graph).nodes if one.name == node.name)
            assert Emitter(copy.graph, copy).emit(copy.target, *copy.args, **copy.kwargs).meta[SPEC] == node.meta[SPEC]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    text = path.read_text()
    installed = ["torch", *(module for line in said(text, "installed") for module in line.split())]
    monkeypatch.setattr(backends, "_importable", lambda module: module in installed)
    before, outputs = parse(text), []
    check(before, "the text")
    for run in said(text, "run"):
        passes = parse_passes(run)
        assert passes[-1].kind.name == shown(path)
        after = apply_passes(before, passes)
        check(after, shown(path))
        document = write(after)
        assert difference(parse(document.text, document.attachments), after) is None
        assert difference(before, parse(text)) is None, "a pass leaves its input alone"
        outputs.append(f"// run: {run}\n{document.text}")
    assert outputs
    golden(f"passes/{path.stem}.out.ir", "\n".join(outputs).rstrip())

"""Run by `test_further_dim.py`: everything that knows of mesh dims, with one more line in the table of `ir/mesh.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

LINE = '    MeshDim("expert", "e", "experts", "experts"),\n'


class WithOneMoreLine(SourceFileLoader):
    """The module as if `LINE` stood at the end of its table."""

    def get_code(self, fullname: str) -> CodeType:
        before, start, rest = Path(self.path).read_text().partition("\nDIMS = (\n")
        table, end, after = rest.partition("\n)\n")
        return compile(f"{before}{start}{table}\n{LINE}{end[1:]}{after}", self.path, "exec")


class Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "xdit_ir.ir.mesh" else None
        if spec is not None and spec.origin is not None:
            spec.loader = WithOneMoreLine(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())

import torch  # noqa: E402

import xdit_ir as xir  # noqa: E402
from xdit_ir import degrees, models  # noqa: E402
from xdit_ir.api import ParallelProgram, TracedProgram  # noqa: E402
from xdit_ir.checking.check import check_parallel  # noqa: E402
from xdit_ir.inspection import WRITERS, inspect  # noqa: E402
from xdit_ir.inspection.views import view  # noqa: E402
from xdit_ir.ir.layout import Layout  # noqa: E402
from xdit_ir.ir.mesh import MESH_DIMS, Mesh  # noqa: E402
from xdit_ir.ir.program import SPEC, Program  # noqa: E402
from xdit_ir.passes.base import run_passes  # noqa: E402
from xdit_ir.passes.lower_attention import LowerAttention  # noqa: E402
from xdit_ir.passes.order import token_passes  # noqa: E402
from xdit_ir.passes.overlap import Overlap  # noqa: E402
from xdit_ir.passes.registry import apply_passes, parse_passes  # noqa: E402
from xdit_ir.passes.split_statistics import SplitStatistics  # noqa: E402
from xdit_ir.planning.schedule import timeline  # noqa: E402
from xdit_ir.sharding.propagate import Propagation  # noqa: E402
from xdit_ir.sharding.verify import verify  # noqa: E402
from xdit_ir.text import difference, parse, write  # noqa: E402

MESH = Mesh.of(expert=2)


def divided(program: Program, mesh: Mesh, dim: int) -> Program:
    """The first token stream divided by hand along one of its dims over `expert`."""
    node = next(node for node in program.graph.nodes if node.name == program.tokens[0].value)
    shape = node.meta[SPEC].shape
    layout = Layout.whole(len(shape)).with_dims({dim: mesh.divide(shape[dim], ("expert",))})
    return Propagation(program, mesh).run({node.name: (layout,)}).replace(mesh=mesh)


def runs_by_hand(traced: TracedProgram, model: torch.nn.Module, example: Any, mesh: Mesh, dim: int) -> None:
    """What was divided over the further dim is lowered, verified, simulated, reported, written, read and seen."""
    program = divided(traced.analysed, mesh, dim)
    program = run_passes(program, [*token_passes(mesh), LowerAttention(mesh), SplitStatistics(), Overlap(mesh)])
    verify(program, runnable=True)
    parallel = ParallelProgram(traced.ir, traced.analysed, program, mesh)
    result = check_parallel(parallel, model, example)
    assert result.ok, str(result)
    report = parallel.report()
    assert max(report.flops_per_rank) < 0.9 * report.flops_total / (mesh.world_size / 2), str(report)
    assert any("expert" in one.mesh_dim for one in report.collectives), str(report)
    text = write(program)
    assert "expert" in text.text.partition("{")[2] and difference(program, parse(text.text, text.attachments)) is None
    assert any("expert" in box.dims for box in view(program).boxes)
    assert timeline(parallel).total > 0


def main() -> None:
    assert MESH_DIMS[-1] == "expert" and MESH.degrees["expert"] == 2
    model, example = models.load("pixart-sigma:tiny")
    traced = xir.trace(model, example)
    tokens = traced.analysed.tokens[0].dim
    for mesh, dim in ((MESH, tokens), (Mesh.of(ulysses=2, expert=2), tokens), (MESH, -1)):
        runs_by_hand(traced, model, example, mesh, dim)
    # What takes degrees takes the further one.
    assert degrees.parse("e2u2") == [degrees.Degrees.of(ulysses=2, expert=2)]
    assert xir.check(model, example, traced=traced, expert=2, ulysses=2).world_size == 4
    seen = inspect(traced, "pixart-sigma:tiny", expert=2, pipefusion=2)
    assert seen.mesh == {"pipefusion": 2, "expert": 2} and seen.legend["expert"] == "experts"
    assert "expert" in WRITERS["html"](seen)
    steps = parse_passes("find-tokens,shard-tokens{ulysses=2 expert=2},propagate-layouts,lower-attention")
    made = apply_passes(traced.analysed, steps)
    assert made.mesh == Mesh.of(ulysses=2, expert=2)
    assert xir.port(model, expert=2)._xdit_specialisations.mesh == MESH


if __name__ == "__main__":
    main()

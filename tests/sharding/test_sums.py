"""Sums of which every rank wants a part: a reduce-scatter, on every rank equal to the sum that is cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import SEQUENCE, Mesh
from xdit_ir.ir.printer import outer_text
from xdit_ir.ir.program import Program
from xdit_ir.sharding.cost import relayout_bytes
from xdit_ir.sharding.propagate import Propagation
from xdit_ir.sharding.report import make_report
from xdit_ir.sharding.specialize import Specialize
from xdit_ir.sharding.verify import verify
from xdit_ir.simulation.lockstep import run_ranks
from xdit_ir.text import parse, write

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def divided(model: nn.Module, mesh: Mesh, tokens: tuple[str, ...]) -> Program:
    """Features divided over the whole mesh, and the result's rows over `tokens`."""
    traced = xir.trace(model, (X,)).ir
    features = Layout((None, mesh.divide(8, SEQUENCE)))
    rows = Layout((mesh.divide(5, tokens), None))
    program = Propagation(traced, mesh).run({"x": (features,), "linear": (rows,)}).replace(mesh=mesh)
    verify(program)
    return program


def equal_everywhere(program: Program, model: nn.Module) -> bool:
    assert program.mesh is not None
    ranks = [Specialize(rank).apply(program) for rank in range(program.mesh.world_size)]
    with torch.no_grad():
        found = run_ranks(ranks, model_state(program, model), [X], torch.device("cpu"))
        return all(torch.allclose(one, model(X), atol=1e-6) for (one,) in found)


@pytest.mark.parametrize("mesh", [Mesh.of(ulysses=2), Mesh.of(ring=3), Mesh.of(ulysses=8)], ids=str)
def test_a_sum_that_is_cut_is_scattered(mesh: Mesh) -> None:
    model = Projection()
    program = divided(model, mesh, SEQUENCE)
    assert "reduce_scatter" in outer_text(program) and "all_reduce" not in outer_text(program)
    assert equal_everywhere(program, model)
    assert parse(write(program).text).mesh == mesh


def test_dims_that_do_not_cut_it_are_summed_behind(golden) -> None:  # type: ignore[no-untyped-def]
    model, mesh = Projection(), Mesh.of(ring=2, ulysses=2)
    program = divided(model, mesh, ("ulysses",))
    golden("reduce_scatter", outer_text(program))
    assert equal_everywhere(program, model)


def test_it_sends_half_of_what_an_all_reduce_does() -> None:
    program = divided(Projection(), Mesh.of(ulysses=2), ("ulysses",))
    [scatter] = (node for node in program.graph.nodes if "reduce_scatter" in node.name)
    assert relayout_bytes(scatter, Mesh.of(ulysses=2)) == (2 * 6 * 4, 3 * 6 * 4)  # each has 3 or 2 rows of 6 floats
    kinds = {one.kind: one for one in make_report(program, program).collectives}
    assert kinds["reduce_scatter"].mesh_dim == "ulysses" and kinds["reduce_scatter"].count == 1

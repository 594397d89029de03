"""What an operator widens by itself has the bits of what a cast widened before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import tensors_of
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.drop_casts import PROMOTING, DropCasts
from xdit_ir.passes.write_in_place import WriteInPlace
from xdit_ir.simulation.examples import run_single
from xdit_ir.text import equal


@pytest.mark.parametrize("operator", sorted(PROMOTING, key=str), ids=str)
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)],
)
def test_an_operator_widens_exactly(operator: torch._ops.OpOverload, narrow: torch.dtype, wide: torch.dtype) -> None:
    x, table = torch.randn(2, 5, 8).to(narrow), torch.randn(5, 1, dtype=wide)
    for one, other in (((x, table), (x.to(wide), table)), ((table, x), (table, x.to(wide)))):
        found, expected = operator(*one), operator(*other)
        assert found.dtype == wide and torch.equal(found, expected)


def casts(program: Program) -> int:
    """How many blocks have, all kinds together."""
    nodes = (node for block in program.blocks.values() for node in block.graph.nodes)
    return sum(node.target is torch.ops.aten._to_copy.default for node in nodes)


@torch.no_grad()
def test_pairs_that_are_turned_are_widened_by_their_tables() -> None:
    model, example = models.load("flux.1-dev:tiny", seed=0, dtype=torch.bfloat16)
    program = xir.trace(model, example).parallelize().rank(0)
    made = run_passes(program, [DropCasts()])
    assert casts(program) - casts(made) == 8, "two of queries and two of keys in each kind of block"
    want, got = (run_single(one, model, example) for one in (program, made))
    assert torch.equal(want[0], got[0])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Two models; all with `--zoo-all`."""
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo-all")
        metafunc.parametrize("name", models.names() if every else ["wan2.1-t2v-1.3b", "lumina-2"])


@torch.no_grad()
def test_a_model_gives_the_same_bits_without(name: str) -> None:
    (model, example), *fresh = (models.load(f"{name}:tiny", dtype=torch.bfloat16) for _ in range(4))
    try:
        model(**fresh[0][1])  # which may write to its inputs
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"not in bf16 on CPUs: {error}")
    program = xir.trace(model, example).parallelize().rank(0)
    want, got = (
        tensors_of(run_single(one, model, given))
        for one, (_, given) in zip(
            (program, run_passes(program, [DropCasts(), WriteInPlace()])), fresh[1:], strict=True
        )
    )
    assert all(map(torch.equal, got, want))


@torch.no_grad()
def test_what_is_stored_in_float8_keeps_its_cast() -> None:
    """As PyTorch has no sums and products with it."""

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(12, 8).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table.to(x.dtype)

    model, x = Stored(), torch.randn(2, 12, 8)
    program = xir.trace(model, (x,)).parallelize().rank(0)
    made = run_passes(program, [DropCasts()])
    assert equal(made, program)
    torch.testing.assert_close(run_single(made, model, (x,)), model(x))

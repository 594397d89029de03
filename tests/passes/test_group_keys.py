"""Repeated keys are exchanged once, however they are repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.ir import ops
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.printer import program_text
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.group_keys import GroupKeys

Golden = Callable[[str, str], None]
HEADS = 2


def interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, -3)


def interleave_before(x: Tensor) -> Tensor:
    return x.transpose(1, 2).repeat_interleave(3, 2).transpose(1, 2)


def expand(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2)


def expand_before(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return x[:, :, :, None].expand(-1, -1, -1, 3, -1).flatten(2, 3).transpose(1, 2)


def tile(x: Tensor) -> Tensor:
    return x.repeat(1, 3, 1, 1)


def expand_outside(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2)


class Model(nn.Module):
    def __init__(self, repeat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v), attn_mask=mask, scale=0.5)


@pytest.mark.parametrize(
    ("repeat", "heads"),
    [(interleave, 2), (interleave_before, 2), (expand, 2), (expand_before, 2), (tile, 6), (expand_outside, 6)],
)
def test_heads_of_keys(repeat: Callable[[Tensor], Tensor], heads: int, golden: Golden) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 5, 4) for n in (3 * HEADS, HEADS, HEADS)] + [torch.rand(5, 5) > 0.3]
    inputs[3][:, 0] = True
    model = Model(repeat)
    program = run_passes(xir.trace(model, tuple(inputs)).ir, [Canonicalize(), GroupKeys()])
    (attention,) = (node for node in program.graph.nodes if node.target is ops.attention)
    assert [attention.args[i].meta["spec"].shape[1] for i in (1, 2)] == [heads] * 2  # type: ignore[union-attr]
    (got,) = Interpreter(program, model_state(program, model), torch.device("cpu")).run(inputs)
    torch.testing.assert_close(got, model(*inputs))
    golden(f"group_keys.{repeat.__name__}", program_text(program, bodies=True))

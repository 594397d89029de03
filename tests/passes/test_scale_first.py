"""What PyTorch's compiler makes of products with int8 weights."""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.utils import counters

from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.scale_first import ScaleFirst
from xdit_ir.text import parse

TEXT = """
program Quantised {
  input %x: bf16[2, 16, 128]
  input %weight: int8[32, 128]
  input %scale: bf16[32]
  %to_copy: bf16[32, 128] = _to_copy(%weight, dtype=bf16)
  %linear: bf16[2, 16, 32] = linear(%x, %to_copy)
  %scaled: bf16[2, 16, 32] = mul.Tensor(%linear, %scale)
  %rows: bf16[32, 128] = reshape(%x, [32, 128])
  %t: int8[128, 32] = t(%weight)
  %turned: bf16[128, 32] = _to_copy(%t, dtype=bf16)
  %mm: bf16[32, 32] = mm(%rows, %turned)
  %both: bf16[32, 32] = mul.Tensor(%mm, %scale)
  return %scaled, %both
}

facts local
"""


def compiled(program: Program) -> tuple[list[torch.Tensor], int]:
    """What it gives, and how often a product was taken for `_weight_int8pack_mm`."""
    generator = torch.Generator().manual_seed(0)
    specs = [node.meta[SPEC] for node in program.graph.find_nodes(op="placeholder")]
    given = [torch.randint(-9, 9, spec.shape, generator=generator).to(spec.dtype) for spec in specs]
    torch._dynamo.reset()
    counters["inductor"].clear()
    results = torch.compile(fx.GraphModule({}, program.graph), dynamic=False)(*given)
    return list(results), counters["inductor"]["woq_matcher_count"]


def test_none_is_done_by_the_slow_kernel() -> None:
    """Behind the pass; ahead of it both are, by PyTorch 2.11 and 2.13 alike."""
    program = parse(TEXT)
    want, taken = compiled(program)
    got, left = compiled(run_passes(program, [ScaleFirst()]))
    assert taken == 2 and left == 0
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)

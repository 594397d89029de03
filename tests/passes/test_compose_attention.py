"""Attention in other people's spellings becomes one operator, and stays equal; what is no attention is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdit_ir as xir
from xdit_ir.ir import ops
from xdit_ir.ir.interpret import Interpreter, model_state
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.compose_attention import ComposeAttention

Golden = Callable[[str, str], None]
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
B, H, N, M, D = 2, 3, 5, 7, 4


def matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), -1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bjhd->bhij", q, k.transpose(1, 2)).mul(0.3)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.transpose(1, 2)).transpose(1, 2)


def swapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bjhd,bhid->bhij", k.transpose(1, 2), q)
    return torch.einsum("bjhd,bhij->bhid", v.transpose(1, 2), scores.softmax(-1))


def bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(B, H, N, M) * 0.5
    scores = (scores + mask.float()[:, None, None] * -10.0).view(B * H, N, M)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, N, D)


def values_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).mul(0.5).softmax(2)
    return torch.bmm(v.flatten(0, 1).mT, scores.permute(0, 2, 1)).mT.view(B, H, N, D)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    bias = mask.float()[:, None].expand(B, N, M).repeat_interleave(H, 0)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=2, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(B, H, N, D)


def filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(mask[:, None, None], -math.inf).softmax(-1) @ v


def all_hidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.ones(B, 1, 1, M, dtype=torch.bool), -1e9).softmax(-1) @ v


def where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None, None], -math.inf, q @ k.mT).softmax(-1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.dropout((q @ k.mT).double().softmax(-1).to(v.dtype), 0.0) @ v


def shared_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.linspace(0, 1, H * N * M).view(H, N, M) + q @ k.mT).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).tanh().softmax(-1) @ v


def softly_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(mask[:, None, None], -10.0).softmax(-1) @ v


def weights_kept(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum()


def over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


class Model(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.form(q, k, v, mask)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D, generator=generator) for n in (N, M, M))
    return {"q": q, "k": k, "v": v, "mask": torch.rand(B, M, generator=generator) > 0.6}


def composed(form: Form) -> Program:
    """The program, after it was compared with the model."""
    model = Model(form)
    program = run_passes(xir.trace(model, inputs()).ir, [Canonicalize(), ComposeAttention()])
    values = list(inputs().values())
    (got,) = Interpreter(program, model_state(program, model), torch.device("cpu")).run(values)
    torch.testing.assert_close(got, model(*values), rtol=1e-5, atol=1e-5)
    return program


FORMS: list[Form] = [
    matmul,
    scaled_before,
    einsum,
    swapped,
    bmm,
    baddbmm,
    filled,
    all_hidden,
    where,
    upcast,
    values_first,
]
FORMS += [shared_keys, biased]


@pytest.mark.parametrize("form", FORMS)
def test_one_operator(form: Form) -> None:
    targets = [node.target for node in composed(form).graph.nodes]
    assert targets.count(ops.attention) == 1
    assert not any("softmax" in str(target) for target in targets)


@pytest.mark.parametrize("form", [capped, softly_filled, weights_kept, over_queries])
def test_left_alone(form: Form) -> None:
    assert ops.attention not in [node.target for node in composed(form).graph.nodes]


@pytest.mark.parametrize("form", [matmul, bmm, baddbmm])
def test_as_text(form: Form, golden: Golden) -> None:
    golden(f"compose_attention.{form.__name__}", program_text(composed(form), bodies=True))

"""A small model behind passes, as text; each pass for itself: `test_on_text.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.printer import body_text, program_text
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.canonicalize import Canonicalize
from xdit_ir.passes.find_tokens import FindTokens
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.passes.order import token_passes
from xdit_ir.passes.split_batch import SplitBatch
from xdit_ir.passes.split_statistics import SplitStatistics
from xdit_ir.sharding.specialize import Specialize

Golden = Callable[[str, str], None]


class Layer(nn.Module):
    """Self-attention of joint text and image tokens, then cross-attention to the text, adaLN from a condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 2 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.query, self.context = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(condition)[:, None].chunk(2, -1)
        joint = torch.cat([text, image * (1 + scale) + shift], 1)
        q, k, v = self.qkv(joint).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = image + self.out(mixed)[:, text.shape[1] :]
        q = self.query(image).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.context(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return image + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Small(nn.Module):
    """Patches in, two layers, patches out."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(2))
        self.head = nn.Linear(width, 12)

    def forward(self, latents: torch.Tensor, text: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = self.patch(latents)
        batch, _, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, text, condition)
        x = self.head(x).reshape(batch, height, width, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(batch, 3, 2 * height, 2 * width)


@pytest.fixture(scope="module")
def found() -> Program:
    example = {
        "latents": torch.zeros(2, 3, 8, 8),
        "text": torch.zeros(2, 4, 8),
        "condition": torch.zeros(2, 8),
    }
    return run_passes(xir.trace(Small(), example).ir, [Canonicalize(), FindTokens()])


def test_find_tokens(found: Program) -> None:
    text, image = sorted(found.tokens, key=lambda axis: axis.size)
    assert (text.value, text.dim, text.size, text.is_context) == ("text", 1, 4, False)
    assert (image.dim, image.size, image.is_context) == (1, 16, False)
    assert 4 in image.units, "rows of the patch grid"


def test_shard_tokens(found: Program, golden: Golden) -> None:
    golden("shard_tokens", program_text(run_passes(found, token_passes(Mesh.of(ulysses=2))), bodies=True))


@pytest.mark.parametrize(
    ("name", "mesh"), [("usp", Mesh.of(ulysses=2, ring=2)), ("cfg_ulysses", Mesh.of(cfg=2, ulysses=2))]
)
def test_lower_attention(name: str, mesh: Mesh, found: Program, golden: Golden) -> None:
    passes = [SplitBatch(mesh), *token_passes(mesh), LowerAttention(mesh), SplitStatistics()]
    lowered = run_passes(found, passes)
    golden(f"lower_attention.{name}", body_text(lowered, "Layer"))


def test_specialize(found: Program, golden: Golden) -> None:
    mesh = Mesh.of(ulysses=3)
    lowered = run_passes(found, [*token_passes(mesh), LowerAttention(mesh), SplitStatistics()])
    golden("specialize.rank1_of_3", program_text(Specialize(1).apply(lowered), bodies=True))


def test_passes_leave_their_input_alone(found: Program) -> None:
    before = program_text(found, bodies=True)
    mesh = Mesh.of(cfg=2, ulysses=2, ring=2)
    run_passes(found, [SplitBatch(mesh), *token_passes(mesh), LowerAttention(mesh), SplitStatistics()])
    assert program_text(found, bodies=True) == before


def test_two_kinds_of_blocks_read_on_one_screen(golden: Golden) -> None:
    traced = xir.trace(*models.load("flux.1-dev:tiny"))
    for name, text in (("flux.before", str(traced)), ("flux.u2", str(traced.parallelize(ulysses=2)))):
        assert len(text.splitlines()) <= 40
        golden(name, text)

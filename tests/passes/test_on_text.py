"""Passes on texts by hand: a program goes in as text, and what comes out is compared as text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xdit_ir.kernels import backends
from xdit_ir.passes.registry import apply_passes, parse_passes
from xdit_ir.text import parse, write

Golden = Callable[[str, str], None]

# Two blocks attend from an image to the same text, which is embedded by a wide layer.
CROSS = """
program Model {
  input %image: f32[1, 256, 32]
  input %text: f32[1, 32, 32]
  %up: f32[1, 32, 4096] = linear(%text, @up.weight)
  %down: f32[1, 32, 32] = linear(%up, @down.weight)
  %first: (f32[1, 256, 32]) = Cross<blocks.0>(%image, %down)
  %x: f32[1, 256, 32] = %first[0]
  %second: (f32[1, 256, 32]) = Cross<blocks.1>(%x, %down)
  %y: f32[1, 256, 32] = %second[0]
  return %y
}

block Cross(%x: f32[1, 256, 32], %text: f32[1, 32, 32]) {
  %query: f32[1, 256, 32] = linear(%x, @query.weight)
  %key: f32[1, 32, 32] = linear(%text, @key.weight)
  %q: f32[1, 256, 4, 8] = reshape(%query, [1, 256, 4, 8])
  %k: f32[1, 32, 4, 8] = reshape(%key, [1, 32, 4, 8])
  %qh: f32[1, 4, 256, 8] = permute(%q, [0, 2, 1, 3])
  %kh: f32[1, 4, 32, 8] = permute(%k, [0, 2, 1, 3])
  %mixed: f32[1, 4, 256, 8] = attention(%qh, %kh, %kh)
  %back: f32[1, 256, 4, 8] = permute(%mixed, [0, 2, 1, 3])
  %joined: f32[1, 256, 32] = reshape(%back, [1, 256, 32])
  %total: f32[1, 256, 32] = add.Tensor(%x, %joined)
  return %total
}

weights {
  up.weight: f32[4096, 32]
  down.weight: f32[32, 4096]
  blocks.0.query.weight: f32[32, 32]
  blocks.0.key.weight: f32[32, 32]
  blocks.1.query.weight: f32[32, 32]
  blocks.1.key.weight: f32[32, 32]
}

facts canonical
"""

# The same blocks, each of which attends from the image to itself.
ITSELF = (
    CROSS.replace("%key: f32[1, 32, 32] = linear(%text,", "%key: f32[1, 256, 32] = linear(%x,")
    .replace(
        "%k: f32[1, 32, 4, 8] = reshape(%key, [1, 32, 4, 8])", "%k: f32[1, 256, 4, 8] = reshape(%key, [1, 256, 4, 8])"
    )
    .replace("%kh: f32[1, 4, 32, 8]", "%kh: f32[1, 4, 256, 8]")
)

# One rank's part of a layer: a projection with a GELU behind, one used twice, one in full precision.
MLP = """
program Mlp {
  input %x: bf16[2, 8]
  input %wide: f32[2, 8]
  %hidden: bf16[2, 16] = linear(%x, @up.weight, @up.bias)
  %active: bf16[2, 16] = gelu(%hidden, approximate='tanh')
  %other: bf16[2, 16] = linear(%x, @up.weight, @up.bias)
  %both: bf16[2, 16] = gelu(%other, approximate='tanh')
  %total: bf16[2, 16] = add.Tensor(%both, %other)
  %exact: f32[2, 16] = linear(%wide, @wide.weight, @wide.bias)
  %kept: f32[2, 16] = gelu(%exact, approximate='tanh')
  return %active, %total, %kept
}

weights {
  up.weight: bf16[16, 8]
  up.bias: bf16[16]
  wide.weight: f32[16, 8]
  wide.bias: f32[16]
}

facts local
"""

# Two writes into a tensor that has just been made, and one into an input.
WRITES = """
program Writes {
  input %x: f32[2, 8]
  input %part: f32[2, 4]
  %made: f32[2, 8] = empty_like(%x)
  %first: f32[2, 8] = slice_scatter(%made, %part, 1, 0, 4)
  %both: f32[2, 8] = slice_scatter(%first, %part, 1, 4, 8)
  %kept: f32[2, 8] = slice_scatter(%x, %part, 1, 0, 4)
  return %both, %kept
}

facts local
"""

# Attention of one rank: long enough for a kernel, with a mask, and around a ring of two of which one has no keys.
ATTENTIONS = """
program Attentions {
  input %q: bf16[1, 8, 4096, 64]
  input %mask: bf16[4096, 4096]
  %plain: bf16[1, 8, 4096, 64] = attention(%q, %q, %q)
  %masked: bf16[1, 8, 4096, 64] = attention(%q, %q, %q, %mask)
  %ring: bf16[1, 8, 4096, 64] = Ring{kind: 'ring_attention', mesh_dims: ('ring',), group: (0, 1), keys: (4096, 0)}\
(%q, %q, %q)
  return %plain, %masked, %ring
}

facts local
"""


def ran(text: str, passes: str) -> str:
    """The text of what passes make of a text, which can be read back."""
    made = write(apply_passes(parse(text), parse_passes(passes)))
    assert write(parse(made.text)).text == made.text
    return made.text.rstrip()


@pytest.mark.parametrize("name", ["shard-tokens", "replicate-shared", "propagate-layouts"])
def test_seeds(name: str, golden: Golden) -> None:
    """`shard-tokens` divides the text too, `replicate-shared` gathers it once, which is then written down."""
    passes = ["find-tokens", "shard-tokens{ulysses=4}", "replicate-shared", "propagate-layouts"]
    count = [one.partition("{")[0] for one in passes].index(name) + 1
    golden(f"on_text.{name.replace('-', '_')}", ran(CROSS, ",".join(passes[:count])))


def test_write_in_place(golden: Golden) -> None:
    golden("on_text.write_in_place", ran(WRITES, "write-in-place"))


def test_fuse_gelu(golden: Golden) -> None:
    golden("on_text.fuse_gelu", ran(MLP, "fuse-gelu"))


@pytest.mark.parametrize(
    ("options", "installed", "name"),
    [
        ("", ("flash_attn_interface",), "hopper"),
        ("{capability=8.6}", (), "ampere"),
        ("{attention=sdpa}", ("flash_attn_interface",), "sdpa"),
    ],
)
def test_choose_kernels(
    options: str, installed: tuple[str, ...], name: str, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is said of the GPU and what is installed, not by what there is where the pass runs."""
    monkeypatch.setattr(backends, "_importable", lambda module: module in ("torch", *installed))
    golden(f"on_text.choose_kernels.{name}", ran(ATTENTIONS, f"choose-kernels{options}"))


def test_use_copy_engines(golden: Golden) -> None:
    """The exchanges around attention in blocks; that of the output, outside of blocks, stays a collective."""
    passes = "find-tokens,shard-tokens{ulysses=2},replicate-shared,propagate-layouts,lower-attention,split-statistics"
    golden("on_text.use_copy_engines", ran(ITSELF, f"{passes},specialize{{rank=1}},use-copy-engines"))

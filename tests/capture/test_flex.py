"""flex_attention: one attention with a mask or a bias, or written out; equal to PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import flex_attention as flex
from torch.utils._pytree import tree_map_only

from xdit_ir.capture import trace
from xdit_ir.capture.flex import uncompiled
from xdit_ir.errors import MismatchError

Run = Callable[..., Any]
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Flex(nn.Module):
    """`[2, tokens, 32]` with 4 heads of queries; `options(self, x, n)` are those of flex_attention."""

    def __init__(self, options: Callable[..., dict[str, Any]], heads: int = 4, pad: int = 0) -> None:
        super().__init__()
        self.options, self.heads, self.pad = options, heads, pad
        self.qkv = nn.Linear(32, 32 + 16 * heads)
        self.bias = nn.Parameter(torch.randn(4, 7, 7))

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> Any:
        q, k, v = self.qkv(x).split([32, 8 * self.heads, 8 * self.heads], -1)
        q, k, v = (item.unflatten(-1, (-1, 8)).transpose(1, 2) for item in (q, k, v))
        q, k, v = (nn.functional.pad(item, (0, 0, 0, self.pad)) for item in (q, k, v))
        out = flex.flex_attention(q, k, v, enable_gqa=self.heads != 4, **self.options(self, x, n))
        return tree_map_only(torch.Tensor, lambda item: item[:, :, : x.shape[1]], out)


def lengths(self: Any, x: torch.Tensor, n: torch.Tensor) -> dict[str, Any]:
    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j < n[b]) & (i >= 0)

    return {"block_mask": flex.create_block_mask(visible, 2, None, 128, 128, device="cpu")}


def window(self: Any, x: torch.Tensor, n: torch.Tensor) -> dict[str, Any]:
    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i - j).abs() <= 1 + h

    return {"block_mask": flex.create_block_mask(near, None, 4, 7, 7, device="cpu")}


def from_activations(self: Any, x: torch.Tensor, n: torch.Tensor) -> dict[str, Any]:
    strong = x.mean(-1) > 0
    strong[:, 0] = True

    def chosen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return strong[b, j] | (i == j)

    count, places = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    return {"block_mask": flex.BlockMask.from_kv_blocks(count, places, mask_mod=chosen, seq_lengths=(7, 7))}


ONE_ATTENTION: dict[str, tuple[Callable[..., dict[str, Any]], int, int]] = {
    "plain": (lambda self, x, n: {}, 4, 0),
    "grouped": (lambda self, x, n: {"scale": 0.3}, 2, 0),
    "lengths and padding": (lengths, 4, 121),
    "window": (window, 4, 0),
    "mask from activations": (from_activations, 4, 0),
    "bias": (lambda self, x, n: {"score_mod": lambda s, b, h, i, j: s + self.bias[h, i, j]}, 4, 0),
    "alibi": (lambda self, x, n: {"score_mod": lambda s, b, h, i, j: s * 0.5 - (i - j).abs() / (h + 1)}, 4, 0),
    "masked bias": (
        lambda self, x, n: window(self, x, n) | {"score_mod": lambda s, b, h, i, j: (s + self.bias[h, i, j]) * 2},
        4,
        0,
    ),
}
WRITTEN_OUT: dict[str, tuple[Callable[..., dict[str, Any]], int, int]] = {
    "soft cap": (lambda self, x, n: {"score_mod": lambda s, b, h, i, j: 5 * torch.tanh(s / 5)}, 2, 0),
    "gate": (lambda self, x, n: {"score_mod": lambda s, b, h, i, j: s * self.bias[h, i, j]}, 4, 0),
    "log-sum-exp": (lambda self, x, n: window(self, x, n) | {"return_aux": flex.AuxRequest(lse=True)}, 4, 0),
    "no key at all": (
        lambda self, x, n: {
            "block_mask": flex.create_block_mask(lambda b, h, i, j: (i > 2) & (j >= 0), None, None, 7, 7, device="cpu"),
            "score_mod": lambda s, b, h, i, j: torch.tanh(s),
        },
        4,
        0,
    ),
}


def close(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        for left, right in zip(found, expected, strict=True):
            assert (left is None) == (right is None)
            close(left, right) if right is not None else None


@pytest.mark.parametrize("name", [*ONE_ATTENTION, *WRITTEN_OUT])
def test_equal_to_flex(name: str, run: Run) -> None:
    model = Flex(*(ONE_ATTENTION | WRITTEN_OUT)[name]).eval()
    n = torch.tensor([7, 4])
    program = trace(model, {"x": torch.randn(2, 7, 32), "n": n})
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(2, 7, 32)
        with torch.no_grad(), uncompiled():
            close(run(program, model, x, n), model(x, n))
    attentions = [node for node in program.graph.nodes if node.target is SDPA]
    assert len(attentions) == (name in ONE_ATTENTION)


def test_mask_follows_its_input(run: Run) -> None:
    model = Flex(lengths, pad=121).eval()
    x = torch.randn(2, 7, 32)
    program = trace(model, (x, torch.tensor([7, 4])))
    other = torch.tensor([3, 6])
    try:
        found = run(program, model, x, other)
    except MismatchError:
        found = run(trace(model, (x, other)), model, x, other)
    with torch.no_grad(), uncompiled():
        close(found, model(x, other))


def test_mask_is_small_where_it_can_be() -> None:
    model = Flex(window).eval()
    program = trace(model, (torch.randn(2, 7, 32), torch.tensor([7, 4])))
    node = next(node for node in program.graph.nodes if node.target is SDPA)
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    assert mask.meta["spec"].shape == (1, 4, 7, 7)

"""Attention in pieces over disjoint keys, merged by log-sum-exp, is attention over all keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xdit_ir.ir import partial_attention
from xdit_ir.kernels.attention import RingMerge, attention_with_lse

KEYS = (5, 0, 7, 3)


def qkv(heads: int = 4, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    total = sum(KEYS)
    return (
        torch.randn(2, heads, 6, 8, generator=make),
        torch.randn(2, kv_heads, total, 8, generator=make),
        torch.randn(2, kv_heads, total, 8, generator=make),
    )


def masks() -> list[torch.Tensor | None]:
    make = torch.Generator().manual_seed(1)
    boolean = torch.rand(2, 1, 6, sum(KEYS), generator=make) > 0.4
    boolean[..., 0] = True
    additive = torch.randn(2, 1, 1, sum(KEYS), generator=make)
    first_piece_hidden = torch.ones(1, 1, 6, sum(KEYS), dtype=torch.bool)
    first_piece_hidden[..., : KEYS[0]] = False
    return [None, boolean, additive, first_piece_hidden]


@pytest.mark.parametrize("mask", masks(), ids=["none", "bool", "additive", "a piece wholly hidden"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3)])
def test_merged_pieces_are_the_whole(mask: torch.Tensor | None, order: tuple[int, ...]) -> None:
    q, k, v = qkv()
    merge = RingMerge(q, mask, 0.3, KEYS)
    for member in order:
        start = sum(KEYS[:member])
        merge.add(member, k[:, :, start : start + KEYS[member]], v[:, :, start : start + KEYS[member]])
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(merge.result(), whole)


def test_grouped_keys() -> None:
    q, k, v = qkv(kv_heads=2)
    merge = RingMerge(q, None, None, (sum(KEYS),), enable_gqa=True)
    merge.add(0, k, v)
    torch.testing.assert_close(merge.result(), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_blocks_of_queries_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    mask = masks()[1]
    whole = attention_with_lse(q, k, v, mask, None)
    monkeypatch.setattr(partial_attention, "MOST_SCORES", 1)
    torch.testing.assert_close(attention_with_lse(q, k, v, mask, None), whole)


def test_a_row_without_keys_gives_zero() -> None:
    q, k, v = qkv()
    out, lse = attention_with_lse(q, k, v, torch.zeros(1, 1, 1, sum(KEYS), dtype=torch.bool), None)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool((lse == -torch.inf).all())

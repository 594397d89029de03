"""FlashAttention 2, 3 and 4 as one operator that torch.compile keeps as it is."""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("xdit_ir::flash_attention", mutates_args=())
def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool, version: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q [batch, queries, heads, dim]`, `k`, `v` `[batch, keys, kv_heads, dim]` -> like q; fp32 log-sum-exp
    `[batch, heads, queries]`.
    """
    given: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if version == 4:
        from flash_attn.cute import flash_attn_func as run

        given["return_lse"] = True
    elif version == 3:
        from flash_attn_interface import flash_attn_func as run

        given["return_attn_probs"] = True
    else:
        from flash_attn import flash_attn_func as run

        given["return_attn_probs"] = True
    out, lse, *_ = run(q, k, v, **given)
    return out, lse


@flash_attention.register_fake
def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)

"""PyTorch's attention kernels, called by name, as `scaled_dot_product_attention`: which kernel runs is decided anew on
each rank, for what it then has of tokens and heads. The log-sum-exp, if it is used, is written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from xdit_ir.capture.operators import argument, aten

KERNELS = frozenset(
    (
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
    )
)
_TRAILING = frozenset({aten._scaled_dot_product_cudnn_attention.default})  # whose log-sum-exp is [..., queries, 1]


def attend_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All results of one of `KERNELS`, of `[batch, heads, tokens, dim]`; what only its backward reads is empty."""
    given = {arg.name: argument(func, args, kwargs, arg.name) for arg in func._schema.arguments}
    q, k, v, causal, scale = (given[name] for name in ("query", "key", "value", "is_causal", "scale"))
    mask = given.get("attn_bias", given.get("attn_mask"))
    grouped = q.shape[1] != k.shape[1]
    seen = [torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()] if causal else []
    lse = logsumexp(q, k, [*seen, *([] if mask is None else [mask])], scale)
    results: dict[str, Any] = {
        "output": F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped),
        "logsumexp": lse.unsqueeze(-1) if func in _TRAILING else lse,
        "max_q": q.shape[2],
        "max_k": k.shape[2],
    }
    results["log_sumexp"] = results["logsumexp"]
    return tuple(results[ret.name] if ret.name in results else q.new_empty(0) for ret in func._schema.returns)


def logsumexp(q: torch.Tensor, k: torch.Tensor, masks: Sequence[torch.Tensor], scale: float | None) -> torch.Tensor:
    """`[..., heads, queries]` in float32, of `[..., heads, tokens, dim]`, with masks as PyTorch takes them."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for mask in masks:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(-1)

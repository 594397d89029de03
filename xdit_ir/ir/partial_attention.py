"""Attention over parts of the keys, as values that ranks can exchange, and the merge of such partial results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xdit_ir.ir.ops import take
from xdit_ir.ir.partition import Runs

MOST_SCORES = 2**28


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    parts: Sequence[Runs] | None = None,
    columns: Runs | None = None,
) -> torch.Tensor:
    """Attention over each of the disjoint `parts` of the keys (positions; None: all are one part).

    Args:
        q: `[..., heads, queries, dim]`; k: `[..., heads, keys, dim]`; v: `[..., heads, keys, dim_v]`.
        mask: broadcastable to `[..., heads, queries, keys]`; bool (True: attend) or additive.
        columns: which columns of the mask the keys have; None: all.

    Returns:
        `[..., heads, parts * queries, dim_v + lse_columns]` of the dtype of the queries, part by part: what the keys
        of a part give, and beside it the log-sum-exp of each row, see `lse_columns`.
    """
    if mask is not None and columns is not None:
        mask = take(mask, -1, columns)
    if parts is None:
        return _one_part(q, k, v, mask, scale, enable_gqa)
    each = (
        (
            take(k, -2, part),
            take(v, -2, part),
            mask if mask is None or mask.shape[-1] == 1 else take(mask, -1, part),
        )
        for part in parts
    )
    return torch.cat([_one_part(q, *keys, scale, enable_gqa) for keys in each], -2)


def merge_partials(x: torch.Tensor, parts: int) -> torch.Tensor:
    """Attention over all keys from what `partial_attention` gave for so many parts of them, by online softmax (arXiv
    1805.02867): `[..., parts * queries, dim_v + lse_columns]` to `[..., queries, dim_v]`. Rows without keys give 0."""
    wide, columns = _wide(x.dtype), lse_columns(x.dtype)
    x = x.reshape(*x.shape[:-2], parts, x.shape[-2] // parts, x.shape[-1])
    lse = x[..., -columns:].to(wide).sum(-1, keepdim=True)
    most = lse.amax(-3, keepdim=True)
    weights = torch.exp(lse - most.masked_fill(most == -math.inf, 0))
    total = weights.sum(-3)
    summed = (x[..., :-columns].to(wide) * weights).sum(-3)
    return (summed / total.masked_fill(total == 0, 1)).to(x.dtype)


def lse_columns(dtype: torch.dtype) -> int:
    """How many columns of this dtype hold a log-sum-exp: their sum is it, in half precision to twice its digits."""
    return 2 if dtype.itemsize < 4 else 1


def beside(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A partial result `[..., queries, dim_v]` and its log-sum-exp `[..., queries, 1]` as one value of this dtype."""
    high = lse.to(dtype)
    if lse_columns(dtype) == 1:
        return torch.cat([out.to(dtype), high], -1)
    low = (lse - high).masked_fill(lse == -math.inf, 0)
    return torch.cat([out.to(dtype), high, low.to(dtype)], -1)


def with_all_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with as many heads as queries, where several of these share one."""
    group = q.shape[-3] // k.shape[-3]
    return (k, v) if group == 1 else (k.repeat_interleave(group, -3), v.repeat_interleave(group, -3))


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q k^T scale + mask) v` and the log-sum-exp of each row, both fp32 (fp64 for fp64 inputs), by matrix
    products over blocks of queries.

    Args:
        q: `[..., queries, dim]`; k: `[..., keys, dim]`; v: `[..., keys, dim_v]`.
        mask: broadcastable to `[..., queries, keys]`; bool (True: attend) or additive.

    Returns:
        `[..., queries, dim_v]` and `[..., queries, 1]`; rows without any key give 0 and -inf.
    """
    rows = max(1, MOST_SCORES // max(1, math.prod(q.shape[:-2]) * k.shape[-2]))
    if q.shape[-2] <= rows:
        return _reference(q, k, v, mask, scale)
    blocks = []
    for start in range(0, q.shape[-2], rows):
        part = mask[..., start : start + rows, :] if mask is not None and mask.shape[-2] > 1 else mask
        blocks.append(_reference(q[..., start : start + rows, :], k, v, part, scale))
    return torch.cat([out for out, _ in blocks], -2), torch.cat([lse for _, lse in blocks], -2)


def _one_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    if enable_gqa:
        k, v = with_all_heads(q, k, v)
    return beside(*attention_with_lse(q, k, v, mask, scale), q.dtype)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(q.dtype)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.matmul(q, k.transpose(-1, -2)).to(wide) * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0))
    return torch.matmul(weights.to(v.dtype), v).to(wide), lse


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

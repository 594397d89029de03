"""Attention that also returns its log-sum-exp, and the merge of partial results over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.kernels.backends import BACKENDS, Backend

MOST_SCORES = 2**28


@dataclass(frozen=True)
class KernelAttention:
    """Target of a node that is `ops.attention` by one of `BACKENDS`."""

    backend: str

    @property
    def __name__(self) -> str:
        return f"attention[{self.backend}]"

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As `ops.attention`."""
        return Attention.function(q, k, v, mask, scale, is_causal, enable_gqa, backend=self.backend)


class Attention(FixedCall):
    """A `KernelAttention` in code."""

    def __init__(self, target: KernelAttention) -> None:
        super().__init__()
        self.fixed = {"backend": target.backend}

    @staticmethod
    def function(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
        *,
        backend: str,
    ) -> torch.Tensor:
        """As `ops.attention`."""
        return BACKENDS[backend].run(q, k, v, scale, is_causal)[0]


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    kernel: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q k^T scale + mask) v` and the log-sum-exp of each row, both fp32 (fp64 for fp64 inputs).

    By a kernel that was chosen for this shape and takes no mask, else by matrix products over blocks of queries.

    Args:
        q: `[..., queries, dim]`; k: `[..., keys, dim]`; v: `[..., keys, dim_v]`.
        mask: broadcastable to `[..., queries, keys]`; bool (True: attend) or additive.

    Returns:
        `[..., queries, dim_v]` and `[..., queries, 1]`; rows without any key give 0 and -inf.
    """
    if kernel is not None:
        out, lse = kernel.run(q, k, v, scale, False)
        return out.float(), lse.unsqueeze(-1)
    rows = max(1, MOST_SCORES // max(1, math.prod(q.shape[:-2]) * k.shape[-2]))
    if q.shape[-2] <= rows:
        return _reference(q, k, v, mask, scale)
    blocks = []
    for start in range(0, q.shape[-2], rows):
        part = mask[..., start : start + rows, :] if mask is not None and mask.shape[-2] > 1 else mask
        blocks.append(_reference(q[..., start : start + rows, :], k, v, part, scale))
    return torch.cat([out for out, _ in blocks], -2), torch.cat([lse for _, lse in blocks], -2)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.matmul(q, k.transpose(-1, -2)).to(wide) * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0))
    return torch.matmul(weights.to(v.dtype), v).to(wide), lse


def merge(
    out: torch.Tensor, lse: torch.Tensor, other_out: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint sets of keys (Ring Attention, arXiv 2310.01889)."""
    total = torch.logaddexp(lse, other_lse)
    safe = total.masked_fill(total == -math.inf, 0)
    return out * torch.exp(lse - safe) + other_out * torch.exp(other_lse - safe), total


class RingMerge:
    """Accumulates ring attention for local queries, one peer's keys at a time; `keys[i]` columns of the mask belong
    to the ring's member `i`."""

    def __init__(
        self,
        q: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        keys: tuple[int, ...],
        *,
        enable_gqa: bool = False,
        kernels: Sequence[Backend | None] = (),
    ) -> None:
        self.q, self.mask, self.scale, self.keys, self.gqa = q, mask, scale, keys, enable_gqa
        self.kernels = kernels or (None,) * len(keys)
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, member: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Attend to the keys and values of one member of the ring."""
        if not k.shape[-2]:
            return
        if self.gqa and k.shape[-3] != self.q.shape[-3]:
            group = self.q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
        mask = self.mask
        if mask is not None and mask.shape[-1] != 1:
            mask = mask.narrow(-1, sum(self.keys[:member]), self.keys[member])
        out, lse = attention_with_lse(self.q, k, v, mask, self.scale, self.kernels[member])
        self.state = (out, lse) if self.state is None else merge(*self.state, out, lse)

    def result(self) -> torch.Tensor:
        """The attention over everything added, in the dtype of the queries."""
        if self.state is None:
            return torch.zeros_like(self.q)
        return self.state[0].to(self.q.dtype)

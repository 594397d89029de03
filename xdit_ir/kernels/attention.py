"""Attention that also returns its log-sum-exp, and the merge of partial results over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xdit_ir.ir import partial_attention
from xdit_ir.ir.fixed_call import FixedCall
from xdit_ir.ir.partial_attention import beside, with_all_heads
from xdit_ir.kernels.backends import BACKENDS, Backend


@dataclass(frozen=True)
class KernelAttention:
    """Target of a node that is attention without a mask by one of `BACKENDS`: as `ops.attention`, or where it is
    `partial` as `xdit_ir.ir.partial_attention.partial_attention` over all keys."""

    backend: str
    partial: bool = False

    @property
    def __name__(self) -> str:
        return f"{'partial_attention' if self.partial else 'attention'}[{self.backend}]"

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Shapes are those of the function that it is."""
        return KernelCall.function(q, k, v, scale, is_causal, enable_gqa, backend=self.backend, partial=self.partial)


class KernelCall(FixedCall):
    """A `KernelAttention` in code."""

    def __init__(self, target: KernelAttention) -> None:
        super().__init__()
        self.fixed = {"backend": target.backend, "partial": target.partial}

    @staticmethod
    def function(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
        *,
        backend: str,
        partial: bool,
    ) -> torch.Tensor:
        """As the target."""
        if partial and enable_gqa:
            k, v = with_all_heads(q, k, v)
        out, lse = BACKENDS[backend].run(q, k, v, scale, is_causal)
        return beside(out, lse.unsqueeze(-1), q.dtype) if partial else out


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    kernel: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `xdit_ir.ir.partial_attention.attention_with_lse`; by a kernel that was chosen for this shape and takes no
    mask, if there is one."""
    if kernel is None:
        return partial_attention.attention_with_lse(q, k, v, mask, scale)
    out, lse = kernel.run(q, k, v, scale, False)
    return out.float(), lse.unsqueeze(-1)


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
        if self.gqa:
            k, v = with_all_heads(self.q, k, v)
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

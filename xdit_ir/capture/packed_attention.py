"""Attention as libraries know it, over packed sequences and windows, in terms of PyTorch's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from xdit_ir.capture.kernels import logsumexp


@dataclass(frozen=True)
class PackedAttention:
    """One attention on `[batch, tokens, heads, dim]`, or on `[tokens, heads, dim]` where sequences are packed.

    `queries` and `keys` are the lengths of the packed sequences. `left` and `right` bound the distance of a key from
    its query, counted from the last query and the last key; -1 is no bound. `bias` is a mask as PyTorch takes it. The
    result is as the queries are, or `[batch, heads, tokens, dim]` where `heads_first`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None
    queries: Sequence[int]
    keys: Sequence[int]
    left: int = -1
    right: int = -1
    bias: torch.Tensor | None = None
    heads_first: bool = False

    def run(self) -> torch.Tensor:
        """The attention as one operator."""
        plain = self._unpacked()
        mask, causal = plain._visible()
        q, k, v = (x.transpose(1, 2) for x in (plain.q, plain.k, plain.v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=self.scale, enable_gqa=grouped)
        if self.heads_first:
            return out
        return out.transpose(1, 2).flatten(0, 1) if self.q.dim() == 3 else out.transpose(1, 2)

    def logsumexp(self) -> torch.Tensor:
        """`[batch, heads, queries]`, or `[heads, queries]` where sequences are packed."""
        mask = _mask(self.queries, self.keys, self.left, self.right, self.q.device)
        q, k = (x.transpose(-3, -2) for x in (self.q, self.k))
        return logsumexp(q, k, [] if mask is None else [mask], self.scale)

    def _unpacked(self) -> PackedAttention:
        """With a batch dimension: sequences of one length become a batch, others stay packed in a batch of one."""
        if self.q.dim() != 3:
            return self
        if len({*self.queries}) == len({*self.keys}) == 1:
            q, k, v = (x.reshape(len(self.queries), -1, *x.shape[1:]) for x in (self.q, self.k, self.v))
            return replace(self, q=q, k=k, v=v, queries=self.queries[:1], keys=self.keys[:1])
        return replace(self, q=self.q.unsqueeze(0), k=self.k.unsqueeze(0), v=self.v.unsqueeze(0))

    def _visible(self) -> tuple[torch.Tensor | None, bool]:
        """A mask, or whether attention is causal instead."""
        alone = len(self.queries) == 1 and self.bias is None
        if alone and self.queries == self.keys and (self.left, self.right) == (-1, 0):
            return None, True
        if self.bias is not None:
            return self.bias, False
        return _mask(self.queries, self.keys, self.left, self.right, self.q.device), False


def _mask(
    queries: Sequence[int], keys: Sequence[int], left: int, right: int, device: torch.device
) -> torch.Tensor | None:
    """Which key each query sees: those of its own sequence, within the bounds. None where it sees all."""
    mask = None
    if len(queries) > 1:
        owners = [[i for i, length in enumerate(lengths) for _ in range(length)] for lengths in (queries, keys)]
        of_query, of_key = (torch.tensor(owner, device=device) for owner in owners)
        mask = of_query[:, None] == of_key
    if (left, right) == (-1, -1):
        return mask
    ends = [i + keys[n] - length for n, length in enumerate(queries) for i in range(length)]
    starts = [i for length in keys for i in range(length)]
    distance = torch.tensor(starts, device=device) - torch.tensor(ends, device=device)[:, None]
    for bound, inside in ((right, distance <= right), (left, distance >= -left)):
        if bound >= 0:
            mask = inside if mask is None else mask & inside
    return mask

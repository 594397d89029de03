"""Operators of the IR beyond ATen.

Each is a plain function whose body is its meaning on one device: a change of layout is the identity there. What a
rank does instead is decided by `xdit_ir.sharding.specialize` and done by `xdit_ir.runtime`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention  # not what callers put in its place later

from xdit_ir.ir.partition import Runs


def shard(x: torch.Tensor) -> torch.Tensor:
    """Keep one's own part of what every rank holds; no communication."""
    return x


def gather(x: torch.Tensor) -> torch.Tensor:
    """Collect the parts of a divided dimension on every rank."""
    return x


def all_to_all(x: torch.Tensor) -> torch.Tensor:
    """Exchange parts so that another dimension (or another partition of the same one) is divided."""
    return x


def halo_exchange(x: torch.Tensor) -> torch.Tensor:
    """Extend one's own part by neighbouring indices that other ranks hold."""
    return x


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum the summands that the ranks hold."""
    return x


def reduce_scatter(x: torch.Tensor) -> torch.Tensor:
    """Sum the summands that the ranks hold, each rank its own part of the sum."""
    return x


# In how many pieces what is half precise is copied for statistics.
COPIED = 4
# Those that sum.
SUMS = (all_reduce, reduce_scatter)
RELAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    op.__name__: op for op in (shard, gather, all_to_all, halo_exchange, *SUMS)
}


def is_relayout(target: object) -> bool:
    """Whether a node's target changes a layout and nothing else."""
    return getattr(target, "__name__", "") in RELAYOUTS and RELAYOUTS[target.__name__] is target  # type: ignore[attr-defined]


def communicates(target: object) -> bool:
    """Whether a node's target is a change of layout for which ranks exchange something."""
    return is_relayout(target) and target is not shard


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention, `q [..., heads, queries, dim]`, `k, v [..., heads, keys, dim]`."""
    if 0 in q.shape or 0 in k.shape:  # a rank without heads, queries or keys; kernels do not all accept that
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def attention_of_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rows: Runs, **options: Any
) -> torch.Tensor:
    """Causal `attention` of some queries only, with all keys in natural order; `rows` are their positions."""
    places = torch.cat([torch.arange(start, start + length, device=q.device) for start, length in rows or ((0, 0),)])
    past = places[:, None] >= torch.arange(k.shape[-2], device=q.device)
    if mask is None:
        return attention(q, k, v, past, **options)
    hidden = mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, float("-inf"))
    return attention(q, k, v, hidden, **options)


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`attention` whose keys and values are divided over ranks and passed around among them."""
    return attention(q, k, v, mask, scale, is_causal, enable_gqa)


ATTENTIONS = (attention, ring_attention)


def take(x: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    """The positions `runs` of one dimension, in that order: a view where it is one run."""
    if len(runs) == 1:
        return x.narrow(dim, *runs[0])
    if not runs:
        return x.narrow(dim, 0, 0)
    if len(runs) <= 8:
        return torch.cat([x.narrow(dim, start, length) for start, length in runs], dim)
    index = torch.cat([torch.arange(start, start + length, device=x.device) for start, length in runs])
    return x.index_select(dim, index)


def take_each(x: torch.Tensor, dim: int, parts: Sequence[Runs]) -> tuple[torch.Tensor, ...]:
    """`take` for several selections of the same dimension."""
    return tuple(take(x, dim, runs) for runs in parts)


def put(x: torch.Tensor, source: torch.Tensor, dim: int, runs: Runs) -> torch.Tensor:
    """A copy of `x` in which the positions `runs` of one dimension are replaced by `source`."""
    result = x.clone()
    offset = 0
    for start, length in runs:
        result.narrow(dim, start, length).copy_(source.narrow(dim, offset, length))
        offset += length
    return result


def unpack(x: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """What lies in the bytes `x [bytes]` from `start` on, as a tensor of this type."""
    return x.narrow(0, start, math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def upload(x: torch.Tensor) -> torch.Tensor:
    """Copy what lies in the host's memory to the device."""
    return x


def moments(x: torch.Tensor, count: int) -> torch.Tensor:
    """`[2, batch, groups]` in double precision: sums of `x [batch, groups, ...]` and of its squares, over `count`.

    Such parts of `count` elements add up to their mean and mean square; double, as the square of a mean that is large
    beside the deviations is taken from that.
    """
    dims = tuple(range(2, x.ndim))
    if not x.numel():
        return x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
    exact = _accumulated(x)
    size = x.shape[1] if x.dtype == exact else -(-x.shape[1] // COPIED)  # a copy of all would be the most there is
    found = [torch.var_mean(piece.to(exact), dims, correction=0) for piece in torch.split(x, size, 1)]
    variance, mean = (torch.cat(each, 1).double() for each in zip(*found, strict=True))
    return torch.stack((mean, variance + mean * mean)) * (math.prod(x.shape[2:]) / count)


def normalize(
    x: torch.Tensor, moments: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`x [batch, groups, channels, ...]` less its mean, over its deviation, by the `moments [2, batch, groups]`; times
    `weight [groups, channels]`, plus `bias` of that shape."""
    around, dtype = (1,) * (x.ndim - 3), _accumulated(x)
    mean, square = moments[:, :, :, None]
    scale = (square - mean * mean).clamp_min(0).add(eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = (one.to(dtype).view(*one.shape, *around) for one in (scale, shift))
    if x.dtype == dtype or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.addcmul(shift, x, scale).to(x.dtype)
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))  # rounded as it is written, without a copy


def run_sums(x: torch.Tensor, dim: int, lengths: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Sums of consecutive runs of these lengths of a dimension: `x [..., sum(lengths), ...]` to `[..., runs, ...]`."""
    return torch.cat([run.sum(dim, keepdim=True, dtype=dtype) for run in torch.split(x, list(lengths), dim)], dim)


def run_extremes(x: torch.Tensor, dim: int, lengths: Sequence[int], largest: bool) -> torch.Tensor:
    """The largest or smallest of consecutive runs of these lengths of a dimension, as `run_sums` gives their sums."""
    extreme = torch.amax if largest else torch.amin
    return torch.cat([extreme(run, dim, keepdim=True) for run in torch.split(x, list(lengths), dim)], dim)


def running_sum(
    x: torch.Tensor, sums: torch.Tensor, dim: int, lengths: Sequence[int], dtype: torch.dtype, before: int = 0
) -> torch.Tensor:
    """`cumsum` of `x` along a dimension, going on from the `sums` of the first `before` runs (see `run_sums`)."""
    own = x.cumsum(dim, dtype=dtype)
    return own + sums.narrow(dim, 0, before).sum(dim, keepdim=True) if before else own


def _accumulated(x: torch.Tensor) -> torch.dtype:
    """What kernels accumulate statistics in."""
    return torch.promote_types(x.dtype, torch.float32)


def is_view(target: object) -> bool:
    """Whether a node's target computes nothing: its result is (a part of) an operand, perhaps in another shape."""
    if isinstance(target, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in target._schema.returns)
    return target in (operator.getitem, shard, take, take_each, unpack)


def watch(x: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`x`; by how much it, less `before`, has changed since an earlier step decides whether what is behind it is
    reused."""
    return x


def reuse(y: torch.Tensor, x: torch.Tensor | None = None, group: int = 0) -> torch.Tensor:
    """`y`; where a step reuses it: `x` and what was added to it when `y` was computed last, or what follows from what
    `y` was then. A step reuses all of a `group`, or none."""
    return y

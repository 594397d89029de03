"""`flex_attention` as plain attention: `mask_mod` becomes a boolean mask, a `score_mod` that adds a bias a bias.

Both are run on grids of indices while tracing, so they are operators of the graph like any others, or constants
where everything that they read is known. A `score_mod` that does more is written out as products and a softmax.
As in PyTorch's own eager implementation `mask_mod` alone decides; the lists of blocks only say where to skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention import flex_attention as flex

from xdit_ir.capture.operators import aten
from xdit_ir.capture.recorder import Recorder

_GRIDS = 4


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let `flex_attention` reach the tracer as one operator, and what torch.compile wraps as it was written."""
    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex, name)
    setattr(flex, name, True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        setattr(flex, name, before)


def is_flex(func: Any) -> bool:
    """Whether a higher-order operator is flex_attention."""
    return str(func.name()) == "flex_attention"


@dataclass(frozen=True)
class _Bias:
    """What an additive `score_mod` adds, and by what it scales scores before."""

    factor: float
    terms: list[torch.Tensor]


def attend(
    recorder: Recorder,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    options: dict[str, Any],
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[batch, heads, queries, dim]`, and log-sum-exp and greatest score in units of ln 2."""
    mask = _mask(recorder, block_mask[-1], _sizes(q, k))
    if options.get("OUTPUT_LOGSUMEXP") or options.get("OUTPUT_MAX"):
        return _written_out(recorder, q, k, v, score_mod, mask, scale)
    bias = _bias(recorder, score_mod, _sizes(q, k), q)
    if bias is None:
        return _written_out(recorder, q, k, v, score_mod, mask, scale)
    for term in bias.terms:
        mask = term.to(q.dtype) if mask is None else _joined(mask, term.to(q.dtype))
    k, v = (item.expand(q.shape[0], -1, -1, -1) for item in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale * bias.factor, enable_gqa=q.shape[1] != k.shape[1]
    )
    nothing = q.new_empty(0)
    return out, nothing, nothing


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def _joined(mask: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, term, -math.inf)
    return mask + term


def _written_out(
    recorder: Recorder,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention as products and a softmax; rows without any key are zero."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (item.repeat_interleave(group, 1) for item in (k, v))
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    scores = _on_grid(score_mod, _grids(_sizes(q, k), q.device), scores)
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    greatest = scores.amax(-1)
    shifted = torch.where(greatest == -math.inf, 0.0, greatest)
    weights = torch.exp(scores - shifted.unsqueeze(-1))
    total = weights.sum(-1)
    out = (weights / torch.where(total == 0, 1.0, total).unsqueeze(-1)) @ v.to(wide)
    lse = torch.log(total) + shifted
    return out.to(q.dtype), lse / math.log(2), greatest / math.log(2)


def _grids(sizes: tuple[int, int, int, int], device: torch.device) -> list[torch.Tensor]:
    return [torch.arange(size, device=device) for size in sizes]


def _on_grid(
    mod: Callable[..., torch.Tensor], grids: list[torch.Tensor], score: torch.Tensor | None = None
) -> torch.Tensor:
    """A `score_mod` or `mask_mod`, written for one element, on all of `[batch, heads, queries, keys]`."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    prefix = () if score is None else (0,)
    mapped = mod
    for place in reversed(range(_GRIDS)):
        dims = tuple(0 if i == place else None for i in range(_GRIDS))
        mapped = torch.vmap(mapped, in_dims=(*prefix, *dims))
    with TransformGetItemToIndex():
        return mapped(*grids) if score is None else mapped(score, *grids)


def _mask(recorder: Recorder, mod: Callable[..., torch.Tensor], sizes: tuple[int, int, int, int]) -> Any:
    """The boolean mask, of size 1 along batch and heads where it does not depend on them; None where all is allowed."""
    grids = _grids(sizes, recorder.device)
    mask = _on_grid(mod, grids)
    known = recorder.value(mask).known
    if mod is flex.noop_mask or (known is not None and bool(known.all()) and not recorder.value(mask).roots):
        return None
    return _smallest(recorder, mask, grids)


def _smallest(recorder: Recorder, whole: torch.Tensor, grids: list[torch.Tensor]) -> torch.Tensor:
    for dim in range(2):
        if not _depends(recorder.node(whole), recorder.node(grids[dim])):
            whole = whole.narrow(dim, 0, 1)
    return whole


def _depends(node: fx.Node, on: fx.Node) -> bool:
    """Whether a node's value is computed from another's."""
    seen: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        here = ahead.pop()
        if here is on:
            return True
        if here not in seen:
            seen.add(here)
            ahead += here.all_input_nodes
    return False


def _bias(
    recorder: Recorder, mod: Callable[..., torch.Tensor], sizes: tuple[int, int, int, int], q: torch.Tensor
) -> _Bias | None:
    """What a `score_mod` does to scores, if it only scales them by numbers and adds what does not depend on them."""
    if getattr(flex, "_identity", None) is mod:
        return _Bias(1.0, [])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    score, grids = torch.empty(sizes, dtype=wide, device=q.device), _grids(sizes, q.device)
    result = recorder.value(_on_grid(mod, grids, score))
    start, node, factor = recorder.node(score), recorder.node(result.fake), 1.0
    terms: list[torch.Tensor] = []
    while node is not start:
        step = _affine_step(node, start)
        if step is None:
            return None
        node, factor = step.rest, factor * step.factor
        if step.term is not None:
            term = recorder.tensor(step.term, result.roots)
            terms.append(term.reshape((1,) * (_GRIDS - term.dim()) + tuple(term.shape)) * (step.sign * factor))
    return _Bias(factor, terms)


@dataclass(frozen=True)
class _Step:
    """`factor * rest + sign * term`."""

    rest: fx.Node
    factor: float = 1.0
    term: fx.Node | None = None
    sign: float = 1.0


def _affine_step(node: fx.Node, start: fx.Node) -> _Step | None:
    """The last step of a computation on `start`, if it is a product with a number or the sum with a tensor."""
    if node.target not in _AFFINE or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args[:2]
    number = _number(right)
    if isinstance(left, fx.Node) and number is not None and node.target not in _SUMS:
        return _Step(left, number if node.target is aten.mul.Tensor else 1 / number)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or node.target not in _SUMS:
        return None
    inside = [_depends(item, start) for item in (left, right)]
    if inside == [True, False]:
        return _Step(left, 1.0, right, 1.0 if node.target is aten.add.Tensor else -1.0)
    if inside == [False, True] and node.target is aten.add.Tensor:
        return _Step(right, 1.0, left)
    return None


def _number(item: Any) -> float | None:
    """A literal, also in the form that vmap gives it."""
    if isinstance(item, fx.Node):
        return _number(item.args[0]) if item.target is aten.scalar_tensor.default else None
    return float(item) if isinstance(item, (int, float)) else None


_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_AFFINE = _SUMS | {aten.mul.Tensor, aten.div.Tensor}

"""Kernels for attention: what each takes, and which is used where.

All compute `softmax(q k^T scale) v` and, where a ring merges partial results, the log-sum-exp of each row.
FlashAttention 2, 3 and 4 (arXiv 2307.08691, 2407.08608; the last in CuTe DSL) are used if they are installed.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from xdit_ir.errors import ParallelizeError
from xdit_ir.kernels.flash_ops import flash_attention

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
# Starting a kernel of CuTe DSL takes the host about 0.2 ms, in which an H100 does this many FLOPs.
LAUNCH_FLOPS = 1.2e11
Result = tuple[torch.Tensor, torch.Tensor]
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "float | None", bool], Result]


@dataclass(frozen=True)
class Problem:
    """One attention: `q [..., heads, queries, dim]`, `k [..., kv_heads, keys, dim]`, `v [..., kv_heads, keys, dim_v]`.

    `capability`: the compute capability of the GPU, None without one. `recorded`: it becomes part of a CUDA graph, so
    that the host's time to start it does not count.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: torch.dtype
    capability: tuple[int, int] | None
    masked: bool = False
    causal: bool = False
    recorded: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.q[:-1]) * self.k[-2] * (self.q[-1] + self.v[-1])


@dataclass(frozen=True)
class Backend:
    """A kernel. `run(q, k, v, scale, causal)` gives the result, and the log-sum-exp in fp32 `[batch, heads, queries]`.

    `module` must be importable, the GPU at least of compute capability `capability`, head sizes at most `widest`.
    """

    name: str
    run: Run
    module: str = "torch"
    capability: tuple[int, int] = (8, 0)
    widest: int = 256
    grouped: bool = True

    def refusal(self, problem: Problem) -> str:
        """Why it cannot do this; empty if it can."""
        if not _importable(self.module):
            return f"{self.module} is not installed"
        if problem.capability is None or problem.dtype not in HALF:
            place = "the CPU" if problem.capability is None else "a GPU"
            return f"it needs fp16 or bf16 on a GPU, not {problem.dtype} on {place}"
        if problem.capability < self.capability:
            return f"it needs a GPU of compute capability {'.'.join(map(str, self.capability))}"
        return self._shape_refusal(problem)

    def _shape_refusal(self, problem: Problem) -> str:
        q, k, v = problem.q, problem.k, problem.v
        if problem.masked:
            return "it takes no mask"
        if len(q) != 4 or 0 in q or 0 in k:
            return f"it needs queries and keys [batch, heads, tokens, dim], not {q} and {k}"
        if q[-1] != v[-1] or q[-1] % 8 or q[-1] > self.widest:
            return f"it needs equal head sizes, multiples of 8 up to {self.widest}, not {q[-1]} and {v[-1]}"
        if problem.causal and q[-2] != k[-2]:
            return "it aligns causal attention otherwise where there are not as many queries as keys"
        if q[-3] != k[-3] and not self.grouped:
            return f"it needs as many heads of keys ({k[-3]}) as of queries ({q[-3]})"
        return ""


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> Result:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> Result:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse.view(q.shape[:-1])


def _installed(version: int) -> Run:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> Result:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = flash_attention(q, k, v, scale, causal, version)
        return out.transpose(1, 2), lse

    return run


CUDNN = Backend("cudnn", _cudnn, capability=HOPPER, widest=128, grouped=False)
FLASH = Backend("flash", _flash, grouped=False)
FLASH_2 = Backend("flash-attn-2", _installed(2), "flash_attn.flash_attn_interface")
FLASH_3 = Backend("flash-attn-3", _installed(3), "flash_attn_interface", HOPPER)
FLASH_4 = Backend("flash-attn-4", _installed(4), "flash_attn.cute", HOPPER, 128)
BACKENDS = {backend.name: backend for backend in (FLASH_4, FLASH_3, FLASH_2, CUDNN, FLASH)}
# "sdpa" leaves the choice to PyTorch, and a ring to matrix products; it does everything.
NAMES = ("auto", *BACKENDS, "sdpa")


def choose(name: str, problem: Problem, *, lse: bool = False) -> Backend | None:
    """The kernel for an attention; None: PyTorch's `scaled_dot_product_attention` (with `lse`: matrix products).

    "auto": FlashAttention 4 or 3 if installed (4 where the attention is long enough to hide its start on the host),
    then PyTorch's choice; with `lse` cuDNN (on Hopper and newer) or PyTorch's FlashAttention 2.
    """
    if name != "auto":
        backend = BACKENDS.get(name)
        return backend if backend is not None and not backend.refusal(problem) else None
    fast = [] if problem.flops < LAUNCH_FLOPS and not problem.recorded else [FLASH_4]
    found = (backend for backend in (*fast, FLASH_3, *((CUDNN, FLASH) if lse else ())) if not backend.refusal(problem))
    return next(found, None)


def check_name(name: str) -> None:
    """Raise `ParallelizeError` for a backend that does not exist or is not installed."""
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ParallelizeError(f"attention={name!r}; there are {', '.join(NAMES)}{hint}")
    if name in BACKENDS and not _importable(BACKENDS[name].module):
        raise ParallelizeError(f"attention={name!r} needs {BACKENDS[name].module}, which is not installed; use 'auto'")


@lru_cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False

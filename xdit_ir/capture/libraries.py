"""Calls of attention libraries (flash-attn 2 and 3, xformers, SageAttention), captured as PyTorch's own attention; and
of torchao's product of integers, which looks at how a tensor is printed.

Their kernels do not run on fake tensors, and the libraries need not be installed where a model is traced: it is
enough that its code holds functions of these names. What a call computes follows from its arguments, as the libraries
document them; arguments that attention with a mask cannot express are refused. Quantisation inside is left out.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.packed_attention import PackedAttention
from xdit_ir.capture.source import source_line
from xdit_ir.errors import TraceError
from xdit_ir.reflection.tree import modules_of

Arguments = dict[str, Any]


def _flash(given: Arguments) -> PackedAttention:
    """flash-attn: `[batch, tokens, heads, dim]`, or packed sequences that begin at `cu_seqlens`."""
    if "qkv" in given:
        q, k, v = given.pop("qkv").unbind(-3)
    elif "kv" in given:
        q, (k, v) = given.pop("q"), given.pop("kv").unbind(-3)
    else:
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
    left, right = (-1 if side is None else int(side) for side in given.pop("window_size", None) or (-1, -1))
    right = 0 if given.pop("causal", False) else right
    return PackedAttention(q, k, v, given.pop("softmax_scale", None), *_given_lengths(given, q, k), left, right)


def _sage(given: Arguments) -> PackedAttention:
    """SageAttention: `[batch, heads, tokens, dim]` unless `tensor_layout` is "NHD", or packed sequences."""
    q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
    right = 0 if given.pop("is_causal", False) else -1
    heads_first = given.pop("tensor_layout", "HND") == "HND" and q.dim() == 4
    if heads_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lengths = _given_lengths(given, q, k)
    return PackedAttention(q, k, v, given.pop("sm_scale", None), *lengths, -1, right, heads_first=heads_first)


def _given_lengths(given: Arguments, q: torch.Tensor, k: torch.Tensor) -> tuple[Sequence[int], Sequence[int]]:
    both = given.pop("cu_seqlens", None)
    queries, keys = given.pop("cu_seqlens_q", both), given.pop("cu_seqlens_k", both)
    if q.dim() == 3 and queries is not None and keys is not None:
        return _lengths(queries), _lengths(keys)
    return [q.shape[-3]], [k.shape[-3]]


def _lengths(starts: torch.Tensor | Sequence[int]) -> list[int]:
    """Lengths of sequences from where they begin and end; reading a tensor makes its contents a guard."""
    places = starts.tolist() if isinstance(starts, torch.Tensor) else list(starts)
    return [after - before for before, after in itertools.pairwise(places)]


def _xformers(given: Arguments) -> PackedAttention:
    """xformers: `[batch, tokens, heads, dim]`; `attn_bias` is a tensor, or an object that says what is visible."""
    q, k, v = given.pop("query"), given.pop("key"), given.pop("value")
    bias, scale = given.pop("attn_bias", None), given.pop("scale", None)
    if q.dim() != 4:
        raise TraceError(f"{source_line()}: query of {q.dim()} dimensions cannot be captured; make it 4")
    plain = PackedAttention(q, k, v, scale, [q.shape[1]], [k.shape[1]])
    if bias is None or isinstance(bias, torch.Tensor):
        return replace(plain, bias=bias)
    kind = type(bias).__name__
    if kind == "LowerTriangularMask" and q.shape[1] == k.shape[1]:
        return replace(plain, right=0)
    if kind == "BlockDiagonalMask":
        return replace(plain, queries=_starts(bias.q_seqinfo), keys=_starts(bias.k_seqinfo))
    if not hasattr(bias, "materialize"):
        raise TraceError(f"{source_line()}: attn_bias of type {type(bias).__qualname__} is not known to be a mask")
    return replace(plain, bias=bias.materialize((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q.dtype, q.device))


def _starts(info: Any) -> list[int]:
    known = getattr(info, "seqstart_py", None)
    return _lengths(info.seqstart if known is None else known)


@dataclass(frozen=True)
class _Function:
    """A function of a library: its parameters in order, and what a call means."""

    parameters: str
    meaning: Callable[[Arguments], PackedAttention]

    def replacing(self, name: str, original: Any) -> Callable[..., Any]:
        """What takes the place of the library's function."""
        pair = self.meaning is _flash and _returns_pair(original)

        def attention(*args: Any, **kwargs: Any) -> Any:
            given = self._checked(name, args, kwargs)
            single = self.meaning is _xformers and given["query"].dim() == 3
            if single:  # one head, without a dimension of its own
                given |= {key: given[key].unsqueeze(2) for key in ("query", "key", "value")}
                bias = given.get("attn_bias")
                given |= {"attn_bias": bias.unsqueeze(1)} if isinstance(bias, torch.Tensor) else {}
            wanted = self.meaning(given)
            out = wanted.run()
            return (out, wanted.logsumexp()) if pair else out.squeeze(2) if single else out

        return attention

    def _checked(self, name: str, args: Sequence[Any], kwargs: Arguments) -> Arguments:
        """The arguments by name, without those that change nothing; raises `TraceError` for those that would."""
        names = self.parameters.split()
        if len(args) > len(names):
            raise TraceError(f"{source_line()}: {name} takes at most {len(names)} positional arguments")
        given = dict(zip(names, args, strict=False)) | kwargs
        for key in [key for key in given if key not in _MEANT.split()]:
            item = given.pop(key)
            neutral = item is None or (isinstance(item, (int, float)) and not item)
            if not neutral and key not in _TUNING.split():
                raise TraceError(f"{source_line()}: {name} with {key}={item!r} cannot be captured; leave it out")
        return given


def _returns_pair(original: Any) -> bool:
    """Whether this is a version of flash-attn 3 that always returns the log-sum-exp, too."""
    try:
        names = inspect.signature(original).parameters
    except (TypeError, ValueError):
        return False
    return "softmax_scale" in names and "return_attn_probs" not in names


# Arguments that say what to compute, and those that say only how.
_MEANT = (
    "q k v kv qkv query key value cu_seqlens cu_seqlens_q cu_seqlens_k softmax_scale sm_scale scale causal is_causal "
    "window_size attn_bias tensor_layout"
)
_TUNING = (
    "deterministic num_splits pack_gqa sm_margin max_seqlen max_seqlen_q max_seqlen_k max_s op smooth_k smooth_v "
    "qk_quant_gran pv_accum_dtype quantization_backend"
)
_TWO = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
_THREE = (
    "causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa deterministic "
    "sm_margin return_attn_probs"
)
_VARLEN = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"


def _flashes(parameters: Mapping[str, str]) -> dict[str, _Function]:
    return {name: _Function(text, _flash) for name, text in parameters.items()}


_FLASH_2 = {
    "flash_attn_func": f"q k v {_TWO}",
    "flash_attn_qkvpacked_func": f"qkv {_TWO}",
    "flash_attn_kvpacked_func": f"q kv {_TWO}",
    "flash_attn_varlen_func": f"q k v {_VARLEN} {_TWO} block_table",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_TWO}",
    "flash_attn_varlen_kvpacked_func": f"q kv {_VARLEN} {_TWO}",
}
_FLASH_3 = {
    "flash_attn_func": f"q k v softmax_scale {_THREE}",
    "flash_attn_qkvpacked_func": f"qkv softmax_scale {_THREE}",
    "flash_attn_varlen_func": f"q k v {_VARLEN} seqused_q seqused_k softmax_scale {_THREE}",
}
_SAGE = {
    "sageattn": "q k v tensor_layout is_causal sm_scale return_lse",
    "sageattn_varlen": f"q k v {_VARLEN} is_causal sm_scale smooth_k",
}


@dataclass(frozen=True)
class _Integers:
    """torchao: a product of int8 matrices, summed up in int32."""

    def replacing(self, name: str, original: Any) -> Callable[..., Any]:
        """What takes the place of the library's function."""

        def product(input: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
            rows, inner, columns = *input.shape, mat2.shape[1]
            fits = input.device.type == "cpu" or (rows > _FEW_ROWS and inner % 8 == 0 and columns % 8 == 0)
            return torch._int_mm(input, mat2) if fits else (input.double() @ mat2.double()).to(torch.int32)

        return product


_FEW_ROWS = 16  # as many, or fewer, no kernel of CUDA takes
# By the package that a function is from, the top-level name of its module.
_LIBRARIES: dict[str, dict[str, _Function]] = {
    "flash_attn": _flashes(_FLASH_2),
    "flash_attn_interface": _flashes(_FLASH_3),
    "xformers": {
        "memory_efficient_attention": _Function("query key value attn_bias p scale op output_dtype", _xformers)
    },
    "sageattention": {name: _Function(text, _sage) for name, text in _SAGE.items()},
}
_WEIGHTS = {"torchao": {"safe_int_mm": _Integers()}}


def replacements(model: nn.Module) -> dict[int, Callable[..., Any]]:
    """What takes the place of the libraries' functions, by the id of theirs, in modules imported under their names; of
    those for weights of their own, if the model has such."""
    found: dict[int, Callable[..., Any]] = {}
    kinds = {type(weight) for module in modules_of(model) for weight in dict.values(module._parameters)}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    for module_name, module in list(sys.modules.items()):
        package = module_name.partition(".")[0]
        if package not in _LIBRARIES and package not in _WEIGHTS:
            continue
        known = _WEIGHTS.get(package, {}) if package in packages else _LIBRARIES.get(package, {})
        for name, function in known.items():
            original = getattr(module, "__dict__", {}).get(name)
            if callable(original) and id(original) not in found:
                found[id(original)] = function.replacing(name, original)
    return found

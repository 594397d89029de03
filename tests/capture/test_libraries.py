"""Attention libraries that are not installed: their calls are captured, divided, and equal to plain attention."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.ops import attention

HEADS, DIM, BATCH, TOKENS = 4, 8, 2, 12
SDPA = torch.ops.aten.scaled_dot_product_attention.default
Attend = Callable[..., torch.Tensor]


def library(name: str, **members: Any) -> types.ModuleType:
    """A module whose functions may be named but not run."""
    module = types.ModuleType(name)
    for key, item in members.items():
        setattr(module, key, item)
    return module


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the library's kernel ran")


class SeqInfo:
    def __init__(self, lengths: list[int]) -> None:
        self.seqstart_py = [sum(lengths[:i]) for i in range(len(lengths) + 1)]


class BlockDiagonalMask:
    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.q_seqinfo, self.k_seqinfo = SeqInfo(queries), SeqInfo(keys)


class LowerTriangularMask:
    pass


class Materialized:
    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.zeros(shape[-2:], dtype=dtype, device=device).masked_fill_(~near(shape[-2], 2, 1), float("-inf"))


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def stub() -> Any:
        return lambda *args, **kwargs: never()

    def third(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False) -> Any:
        never()

    two = "flash_attn_func flash_attn_qkvpacked_func flash_attn_kvpacked_func flash_attn_varlen_func"
    two += " flash_attn_varlen_qkvpacked_func flash_attn_varlen_kvpacked_func"
    made = [
        library("flash_attn", **{name: stub() for name in two.split()}),
        library("flash_attn_interface", flash_attn_func=third, flash_attn_varlen_func=stub()),
        library("xformers"),
        library("xformers.ops", memory_efficient_attention=stub()),
        library("sageattention", sageattn=stub(), sageattn_varlen=stub()),
    ]
    made[2].ops = made[3]
    for module in made:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = [dict(vars(module)) for module in made]
    yield
    assert [dict(vars(module)) for module in made] == before


def near(size: int, left: int, right: int) -> torch.Tensor:
    place = torch.arange(size)
    return (place >= place[:, None] - left) & (place <= place[:, None] + right)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, attend: Attend, lengths: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, DIM)).unbind(-3)
        return x + self.out(attend(q, k, v, lengths).flatten(-2))


class Model(nn.Module):
    """`[2, 12, 32]`; `attend(q, k, v, lengths)` takes and returns `[batch, tokens, heads, dim]`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.layers, self.last = attend, nn.ModuleList(Layer() for _ in range(2)), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, self.attend, lengths)
        return self.last(x)


def flash(name: str, **options: Any) -> Attend:
    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        import flash_attn

        if "qkvpacked" in name:
            return getattr(flash_attn, name)(torch.stack([q, k, v], 2), **options)
        if "kvpacked" in name:
            return getattr(flash_attn, name)(q, torch.stack([k, v], 2), **options)
        return getattr(flash_attn, name)(q, k, v, **options)

    return attend


def flash_3(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    import flash_attn_interface

    return flash_attn_interface.flash_attn_func(q, k, v, softmax_scale=0.3)[0]


def starts(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def varlen(form: str, library: str = "flash_attn", **options: Any) -> Attend:
    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        module, cu, longest = sys.modules[library], starts(lengths), int(lengths.max())
        q, k, v = (item.flatten(0, 1) for item in (q, k, v))
        if form == "qkv":
            out = module.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu, longest, 0.0, **options)
        elif form == "kv":
            kv = torch.stack([k, v], 1)
            out = module.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest, 0.0, **options)
        else:
            name = "sageattn_varlen" if library == "sageattention" else "flash_attn_varlen_func"
            out = getattr(module, name)(q, k, v, cu, cu, longest, longest, **options)
        return out.unflatten(0, (BATCH, TOKENS))

    return attend


def sage(layout: str, **options: Any) -> Attend:
    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        from sageattention import sageattn

        if layout == "NHD":
            return sageattn(q, k, v, tensor_layout=layout, **options)
        return sageattn(*(item.transpose(1, 2) for item in (q, k, v)), **options).transpose(1, 2)

    return attend


def xformers(bias: Callable[[torch.Tensor, torch.Tensor], Any], packed: bool = False, **options: Any) -> Attend:
    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        import xformers.ops

        if packed:
            q, k, v = (item.flatten(0, 1).unsqueeze(0) for item in (q, k, v))
        out = xformers.ops.memory_efficient_attention(q, k, v, attn_bias=bias(q, lengths), **options)
        return out.reshape(BATCH, TOKENS, HEADS, DIM)

    return attend


def one_head(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    import xformers.ops

    heads = [item.transpose(1, 2).flatten(0, 1) for item in (q, k, v)]
    return xformers.ops.memory_efficient_attention(*heads).unflatten(0, (BATCH, HEADS)).transpose(1, 2)


def plain(mask: torch.Tensor | None = None, **options: Any) -> Attend:
    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2)

    return attend


def packed(causal: bool = False) -> Attend:
    """Sequences of given lengths, one after the other over the batch, one by one."""

    def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        parts = [item.flatten(0, 1).split(lengths.tolist()) for item in (q, k, v)]
        found = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sequence), is_causal=causal).transpose(0, 1)
            for sequence in zip(*parts, strict=True)
        ]
        return torch.cat(found).unflatten(0, (BATCH, TOKENS))

    return attend


EQUAL, RAGGED = torch.tensor([TOKENS, TOKENS]), torch.tensor([7, 12, 5])
CAUSAL = {"is_causal": True}
BIAS = torch.randn(1, HEADS, TOKENS, TOKENS)
CASES: dict[str, tuple[Attend, Attend, torch.Tensor]] = {
    "dense": (flash("flash_attn_func"), plain(), EQUAL),
    "neutral": (flash("flash_attn_func", dropout_p=0.0, window_size=(-1, -1), softcap=0.0), plain(), EQUAL),
    "causal, scaled": (flash("flash_attn_func", causal=True, softmax_scale=0.2), plain(**CAUSAL, scale=0.2), EQUAL),
    "window": (flash("flash_attn_func", window_size=(2, 1)), plain(near(TOKENS, 2, 1)), EQUAL),
    "qkv": (flash("flash_attn_qkvpacked_func"), plain(), EQUAL),
    "kv": (flash("flash_attn_kvpacked_func", causal=True), plain(**CAUSAL), EQUAL),
    "version 3 with log-sum-exp": (flash_3, plain(scale=0.3), EQUAL),
    "varlen of one length": (varlen("q k v"), plain(), EQUAL),
    "varlen": (varlen("q k v"), packed(), RAGGED),
    "varlen, causal": (varlen("q k v", causal=True), packed(causal=True), RAGGED),
    "varlen qkv": (varlen("qkv"), packed(), RAGGED),
    "varlen kv": (varlen("kv"), packed(), RAGGED),
    "varlen of version 3": (varlen("q k v", "flash_attn_interface", seqused_q=None), packed(), RAGGED),
    "sage": (sage("HND"), plain(), EQUAL),
    "sage, causal": (sage("NHD", is_causal=True, sm_scale=0.1), plain(**CAUSAL, scale=0.1), EQUAL),
    "sage varlen": (varlen("q k v", "sageattention"), packed(), RAGGED),
    "xformers": (xformers(lambda q, n: None, p=0.0, scale=0.4), plain(scale=0.4), EQUAL),
    "xformers, bias": (xformers(lambda q, n: BIAS), plain(BIAS), EQUAL),
    "xformers, causal": (xformers(lambda q, n: LowerTriangularMask()), plain(**CAUSAL), EQUAL),
    "xformers, other mask": (xformers(lambda q, n: Materialized()), plain(near(TOKENS, 2, 1)), EQUAL),
    "xformers, packed": (
        xformers(lambda q, n: BlockDiagonalMask(n.tolist(), n.tolist()), packed=True),
        packed(),
        RAGGED,
    ),
    "xformers, one head": (one_head, plain(), EQUAL),
}
# Sequences packed over the whole batch have no batch to divide.
DEGREES = {"ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "cfg": {"cfg": 2}}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_plain_attention(name: str) -> None:
    attend, reference, lengths = CASES[name]
    model, x = Model(attend).eval(), torch.randn(BATCH, TOKENS, 32)
    traced = xir.trace(model, (x, lengths))
    with torch.no_grad():
        expected = _with(model, reference)(x, lengths)
    bodies = [block.graph for block in traced.ir.blocks.values()]
    assert [sum(node.target is SDPA for node in graph.nodes) for graph in bodies] == [1]
    for degrees in DEGREES.values():
        if "cfg" in degrees and lengths is RAGGED:
            continue
        parallel = traced.parallelize(**degrees)
        assert parallel.report().flops_per_rank[0] < 0.8 * parallel.report().flops_total
        for found in parallel.simulate(model, (x, lengths)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _with(model: Model, attend: Attend) -> Model:
    other = Model(attend).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_other_lengths_are_another_program(run: Any) -> None:
    model, x = Model(varlen("q k v")).eval(), torch.randn(BATCH, TOKENS, 32)
    program = xir.trace(model, (x, RAGGED)).ir
    with pytest.raises(xir.MismatchError, match="lengths"):
        run(program, model, x, RAGGED.flip(0) + 0)


REFUSED: dict[str, tuple[Attend, str]] = {
    "dropout_p": (flash("flash_attn_func", dropout_p=0.1), "dropout_p=0.1"),
    "softcap": (flash("flash_attn_func", softcap=30.0), "softcap=30.0"),
    "alibi_slopes": (flash("flash_attn_func", alibi_slopes=torch.ones(HEADS)), "alibi_slopes"),
    "return_attn_probs": (flash("flash_attn_func", return_attn_probs=True), "return_attn_probs=True"),
    "p": (xformers(lambda q, n: None, p=0.5), "p=0.5"),
    "attn_bias": (xformers(lambda q, n: object()), "attn_bias of type object"),
    "return_lse": (sage("NHD", return_lse=True), "return_lse=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    attend, text = REFUSED[name]
    with pytest.raises(xir.TraceError, match=text):
        xir.trace(Model(attend).eval(), (torch.randn(BATCH, TOKENS, 32), EQUAL))


def _closed_over(function: Any) -> Any:
    return lambda q, k, v: function(q, k, v)


def _by_default(function: Any) -> Any:
    def attend(q: Any, k: Any, v: Any, attend: Any = function, *, again: Any = function) -> Any:
        assert attend is again
        return attend(q, k, v)

    return attend


class _Kind:
    attend: Any = None


def test_found_wherever_modules_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    function = sys.modules["flash_attn"].flash_attn_func
    monkeypatch.setattr(_Kind, "attend", staticmethod(function))
    code = library(
        "code_of_a_model",
        function=function,
        table={"flash": function},
        several=[function],
        closed=_closed_over(function),
        default=_by_default(function),
        Kind=_Kind,
    )
    monkeypatch.setitem(sys.modules, code.__name__, code)

    class Holder(Model):
        def __init__(self) -> None:
            super().__init__(_closed_over(function))
            self.own, self.tables = function, {"flash": [function]}

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            module = sys.modules["code_of_a_model"]
            ways = [
                self.attend,
                module.function,
                module.table["flash"],
                module.several[0],
                module.closed,
                module.default,
            ]
            ways += [module.Kind.attend, self.own, self.tables["flash"][0]]
            q = x.unflatten(-1, (HEADS, DIM))
            return torch.stack([way(q, q, q) for way in ways]).sum(0)

    model, x = Holder().eval(), torch.randn(BATCH, TOKENS, 32)
    traced = xir.trace(model, (x, EQUAL))
    assert sum(node.target in (SDPA, attention) for node in traced.ir.graph.nodes) == 9
    for _ in range(2):  # all is as it was
        with pytest.raises(AssertionError, match="kernel ran"):
            code.closed(x, x, x)
    assert code.default.__defaults__ == (function,) and code.table == {"flash": function} and _Kind.attend is function

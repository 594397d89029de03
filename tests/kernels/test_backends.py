"""Which kernel an attention gets, and what the kernels of other libraries are given."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from xdit_ir.errors import ParallelizeError
from xdit_ir.kernels import backends
from xdit_ir.kernels.attention import attention_with_lse
from xdit_ir.kernels.backends import BACKENDS, Problem, check_name, choose
from xdit_ir.kernels.flash_ops import flash_attention

LONG = (1, 12, 8192, 128)
IMAGE = Problem(LONG, LONG, LONG, torch.bfloat16, capability=(9, 0))
SHORT = dataclasses.replace(IMAGE, q=(1, 12, 1024, 128), k=(1, 12, 1024, 128), v=(1, 12, 1024, 128))
MODULES = {"flash-attn-2": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Modules that count as installed."""
    found = {"torch"}
    monkeypatch.setattr(backends, "_importable", found.__contains__)
    yield found


def chosen(problem: Problem, *, lse: bool = False, name: str = "auto") -> str | None:
    found = choose(name, problem, lse=lse)
    return found and found.name


def test_without_libraries_pytorch_chooses_and_rings_take_cudnn(installed: set[str]) -> None:
    assert chosen(IMAGE) is None
    assert chosen(IMAGE, lse=True) == "cudnn"
    wide = tuple((*LONG[:-1], 256) for _ in range(3))
    assert chosen(dataclasses.replace(IMAGE, q=wide[0], k=wide[1], v=wide[2]), lse=True) == "flash"


def test_the_newest_library_wins(installed: set[str]) -> None:
    installed |= {"flash_attn_interface", "flash_attn.cute"}
    assert chosen(IMAGE) == chosen(IMAGE, lse=True) == "flash-attn-4"
    assert chosen(SHORT) == "flash-attn-3", "the host takes longer to start version 4 than the GPU to do it"
    assert chosen(dataclasses.replace(SHORT, recorded=True)) == "flash-attn-4", "nothing is started in a CUDA graph"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"masked": True}, "mask"),
        ({"dtype": torch.float32}, "fp16 or bf16"),
        ({"capability": None}, "on a GPU, not torch.bfloat16 on the CPU"),
        ({"v": (1, 12, 8192, 64)}, "equal head sizes"),
        ({"q": (1, 12, 0, 128)}, "tokens"),
        ({"q": (1, 12, 100, 128), "causal": True}, "aligns causal"),
    ],
)
def test_what_no_kernel_takes_is_left_to_pytorch(installed: set[str], change: dict[str, object], reason: str) -> None:
    installed |= {"flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"}
    problem = dataclasses.replace(IMAGE, **change)  # type: ignore[arg-type]
    assert chosen(problem) is None and chosen(problem, lse=True) is None
    assert all(reason in backend.refusal(problem) for backend in BACKENDS.values())


def test_an_older_gpu(installed: set[str]) -> None:
    installed |= {"flash_attn_interface", "flash_attn.cute"}
    older = dataclasses.replace(IMAGE, capability=(8, 6))
    assert chosen(older) is None and chosen(older, lse=True) == "flash"


def test_names(installed: set[str]) -> None:
    check_name("sdpa")
    check_name("cudnn")
    assert chosen(IMAGE, name="sdpa", lse=True) is None
    assert chosen(IMAGE, name="flash") == "flash"
    with pytest.raises(ParallelizeError, match="there are auto, flash-attn-4"):
        check_name("flash-attn-5")
    with pytest.raises(ParallelizeError, match=r"needs flash_attn_interface, which is not installed"):
        check_name("flash-attn-3")


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_other_libraries_are_called_as_they_document(
    version: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of the library's signature, on its layout `[batch, tokens, heads, dim]`, in place of its kernel."""

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        **more: bool,
    ) -> tuple[torch.Tensor, ...]:
        assert more == {"return_lse" if version == 4 else "return_attn_probs": True}
        assert q.shape == (2, 6, 4, 8)
        seen = torch.ones(6, 6, dtype=torch.bool).tril() if causal else None
        out, lse = attention_with_lse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, softmax_scale)
        return out.transpose(1, 2).contiguous(), lse.squeeze(-1), torch.empty(0)

    name = MODULES[f"flash-attn-{version}"]
    module = ModuleType(name)
    module.__dict__["flash_attn_func"] = flash_attn_func
    for part in ("flash_attn", name):
        monkeypatch.setitem(sys.modules, part, module if part == name else ModuleType(part))
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    out, lse = BACKENDS[f"flash-attn-{version}"].run(q, k, v, 0.3, causal)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    )
    seen = torch.ones(6, 6, dtype=torch.bool).tril() if causal else None
    torch.testing.assert_close(lse, attention_with_lse(q, k, v, seen, 0.3)[1].squeeze(-1))
    torch.library.opcheck(
        flash_attention,
        (*(x.transpose(1, 2).contiguous() for x in (q, k, v)), 0.3, causal, version),
        test_utils=("test_schema", "test_faketensor"),
    )

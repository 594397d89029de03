"""Operators of users: divided as they declare, and refused where a rule does not fit (docs/operators.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import CustomOpDef

import xdit_ir as xir


@torch.library.custom_op("xdit_ir_tests::weighted", mutates_args=())
def weighted(x: torch.Tensor, weight: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A product over the width, and the sum over the tokens, `rows` of them."""
    assert x.shape[-2] == rows
    return x @ weight, x.sum(-2)


@weighted.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[-1]), x.new_empty(*x.shape[:-2], x.shape[-1])


@torch.library.custom_op("xdit_ir_tests::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@product.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.qkv = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, total = weighted(x, self.weight, x.shape[1])
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return product(x.mT, x) + total[:, None]


@pytest.fixture
def declared() -> Iterator[None]:
    xir.register_rule(
        weighted,
        "... n d, d e -> ... n e, ... d",
        whole="d n",
        sizes={"rows": "n"},
        flops=lambda s: 2 * s["n"] * s["d"],
    )
    xir.register_rule(
        product, "b m k, b k n -> b m n", sums=True, flops=lambda s: 2 * s["b"] * s["m"] * s["k"] * s["n"]
    )
    yield
    for op in (weighted, product):
        vars(op._opoverload.overloadpacket).pop("__xdit_ir__")


def test_divided_as_declared(declared: None) -> None:
    model, example = Model().eval(), (torch.randn(2, 18, 16),)
    for degrees in ({"ulysses": 4}, {"cfg": 2}):
        result = xir.check(model, example, **degrees)
        assert result.ok, str(result)
    report = xir.trace(model, example).parallelize(ulysses=3).report()
    assert [item.kind for item in report.collectives if item.kind == "all_reduce"], (
        "the contracted tokens are summed up"
    )
    assert not [item for item in report.fallbacks if "product" in item.op]


def test_without_a_declaration_it_is_gathered() -> None:
    report = xir.trace(Model().eval(), (torch.randn(2, 18, 16),)).parallelize(ulysses=3).report()
    assert any("no rule for" in item.reason for item in report.fallbacks)


@pytest.mark.parametrize(
    ("op", "rule", "options", "named"),
    [
        (weighted, "b n d -> b n d, b d", {}, r"takes 2 \(x, weight\) and returns 2"),
        (weighted, "b n d, d e = b n e, b d", {}, "needs one arrow"),
        (weighted, "b b d, d e -> b n e, b d", {}, "a name stands twice in one tensor"),
        (weighted, "b n d, d e -> b n e, b d", {"whole": "f"}, r"whole: no 'f'; there are \['b', 'd', 'e', 'n'\]"),
        (weighted, "b n d, d e -> b n e, b d", {"sizes": {"columns": "n"}}, r"no 'columns'; there are \['rows'\]"),
        (weighted, "b n d, d e -> b n e, b d", {"sizes": {"rows": "m"}}, "no 'm'"),
        (torch.ops.aten.linear, "b n d, e d, e -> b n e", {}, "PyTorch's own operator"),
        (torch.sum, "b -> b", {}, "is no operator"),
    ],
)
def test_what_does_not_fit_is_refused(op: CustomOpDef | Any, rule: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=named):
        xir.register_rule(op, rule, **options)

"""Python's own functions call the operators in whose place they stand, with the same arguments."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission import code_writer
from xdit_ir.emission.bound import BOUND, bind
from xdit_ir.ir.program import SPEC, TensorSpec

aten = torch.ops.aten
X, Y = torch.rand(2, 3, 4) + 0.5, torch.rand(2, 3, 4) + 0.5
GIVEN: dict[Any, tuple[Any, ...]] = {
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), (X, Y)),
    aten.pow.Tensor_Scalar: (X, 2),
    aten.bmm.default: (X, Y.mT),
    aten.matmul.default: (X, Y.mT),
    **dict.fromkeys((aten.cat.default, aten.stack.default), ([X, Y], 1)),
    aten.reshape.default: (X, [6, 4]),
    aten.permute.default: (X, [0, 2, 1]),
    aten.transpose.int: (X, 0, 1),
    **dict.fromkeys((aten.unsqueeze.default, aten.unbind.int), (X, -1)),
    aten.squeeze.dim: (X[:, :1], 1),
    aten.layer_norm.default: (X, [4], None, None, 1e-6),
    aten.group_norm.default: (X, 3, None, None, 1e-6),
    aten.rms_norm.default: (X, [4], torch.randn(4), 1e-6),
    aten.linear.default: (X, torch.randn(5, 4), torch.randn(5)),
}


class Seen(TorchDispatchMode):
    """What is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        plain = [tuple(one.shape) if isinstance(one, torch.Tensor) else one for one in given]
        self.calls.append((func, plain))
        return result


def seen(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, list[tuple[Any, list[Any]]]]:
    """The result of a call, and what it calls."""
    with torch.inference_mode(), Seen() as mode:
        return function(*args, **kwargs), mode.calls


@pytest.mark.parametrize("operator", BOUND, ids=str)
def test_a_function_calls_its_operator(operator: Any) -> None:
    given = GIVEN.get(operator, (X,))
    for args in (given, (given[0], 1.5)) if operator in (aten.add.Tensor, aten.mul.Tensor) else (given,):
        want, expected = seen(operator, *args)
        got, calls = seen(BOUND[operator], *args)
        assert calls == expected and calls
        assert all(map(torch.equal, pytree.tree_leaves(got), pytree.tree_leaves(want)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, True), (torch.float32, False)])
def test_a_cast_is_bound_where_it_never_gives_what_it_was_given(dtype: torch.dtype, bound: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    x.meta[SPEC], node.meta[SPEC] = TensorSpec((2, 3, 4), torch.float32), TensorSpec((2, 3, 4), dtype)
    bind(node)
    assert (node.target is torch.Tensor.to) == bound
    graph.output((node,))
    [made] = fx.GraphModule({}, graph)(X)
    assert made is not X and torch.equal(made, X.to(dtype))


@torch.no_grad()
def test_eager_code_calls_the_operators_of_the_program() -> None:
    model, example = models.load("flux.1-dev:tiny", seed=0)
    found = []
    for bound in (True, False):
        with mock.patch.object(code_writer, "bind", bind if bound else lambda node: None):
            port = xir.port(model, mode="eager")
            port(**example)
        [one] = port._xdit_specialisations.found
        assert ("torch.add(" in "".join(body.module.code for body in one.runner.bodies.values())) == bound
        found.append(seen(port, **example))
    assert found[0][1] == found[1][1]
    assert all(map(torch.equal, *(pytree.tree_leaves(result) for result, _ in found)))

"""What `mode` means where, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import xdit_ir as xir
from xdit_ir.emission.compilation import can_fuse, compile_body
from xdit_ir.emission.execution import Execution

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def of(mode: str = "auto", compile: bool | None = None, cuda_graph: bool | None = None) -> Execution:
    return Execution.of(mode, compile, cuda_graph, "auto", "auto", True, None)


@pytest.mark.parametrize(
    ("mode", "on_cuda", "on_cpu"),
    [
        ("auto", (True, True), (False, False)),
        ("eager", (False, False), (False, False)),
        ("compiled", (True, False), (True, False)),
        ("graph", (True, True), (True, True)),
    ],
)
def test_a_mode_is_the_same_as_two_options(mode: str, on_cuda: tuple[bool, bool], on_cpu: tuple[bool, bool]) -> None:
    for device, expected in ((CUDA, on_cuda), (CPU, on_cpu)):
        found = of(mode).on(device)
        assert (found.compile, found.cuda_graph) == expected
        assert found.forced == (mode != "auto")


def test_options_that_are_given_decide() -> None:
    assert of(compile=True).on(CUDA) == Execution(True, False)
    assert of(cuda_graph=False).on(CUDA) == Execution(False, False)
    with pytest.raises(xir.ParallelizeError, match="give one or the other"):
        of("graph", compile=True)


def test_an_unknown_mode_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(xir.ParallelizeError, match=r"'grpah'.*did you mean 'graph'"):
        xir.port(nn.Linear(2, 2), mode="grpah")


def test_graphs_need_cuda() -> None:
    port = xir.port(nn.Linear(2, 2), mode="graph")
    with pytest.raises(xir.ParallelizeError, match="mode='graph' needs a model on a CUDA device"):
        port(torch.ones(1, 2))


class Odd(nn.Module):
    """Cannot be compiled as one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_block_that_cannot_be_compiled_stays_as_it_is_and_says_so() -> None:
    said: list[str] = []
    odd = Odd()
    compile_body(odd, failed=said.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(odd(torch.ones(2)), torch.full((2,), 2.0))
        assert torch.equal(odd(torch.ones(2)), torch.full((2,), 2.0))
    assert len(said) == 1 and "a block is not compiled" in said[0]


def test_where_no_code_in_cpp_can_be_built_python_launches_kernels_and_it_is_said(monkeypatch) -> None:
    compiler = torch.compile

    def without_cpp(function: Callable[..., Any], *, options: dict[str, Any], **settings: Any) -> Any:
        if options.get("cpp_wrapper"):
            raise torch._dynamo.exc.BackendCompilerFailed(compiler, RuntimeError("no compiler of C++"), None)
        return compiler(function, options=options, **settings)

    monkeypatch.setattr(torch, "compile", lambda function, **given: lambda *x: without_cpp(function, **given)(*x))
    said: list[str] = []
    even = nn.Linear(2, 2)
    want = even(torch.ones(1, 2))
    compile_body(even, native=said.append)
    for _ in range(2):
        assert torch.allclose(even(torch.ones(1, 2)), want)
    assert len(said) == 1 and said[0].startswith("kernels are launched by Python: ")


def test_kernels_are_launched_by_cpp_where_a_block_is_called_often_and_no_graph_does_it() -> None:
    assert of("compiled").on(CUDA).launches_itself(CUDA, 8)
    assert not of("compiled").on(CUDA).launches_itself(CUDA, 7)
    assert not of("auto").on(CUDA).launches_itself(CUDA, 8)
    assert not of("compiled").on(CPU).launches_itself(CPU, 8)


def test_where_compilation_is_asked_for_it_is_an_error() -> None:
    odd = Odd()
    compile_body(odd)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        odd(torch.ones(2))


def test_the_report_of_a_port_says_how_it_runs() -> None:
    port = xir.port(nn.Linear(2, 2))
    with pytest.raises(xir.ParallelizeError, match="there was none yet"):
        port.report()
    port(torch.ones(1, 2))
    assert port.report().execution == "eagerly" and "runs eagerly" in str(port.report())


@pytest.mark.parametrize(
    ("body", "fuses"),
    [
        (lambda x, w: F.linear(F.silu(x), w).split(2, -1), False),
        (lambda x, w: F.linear(F.silu(x) * 2, w), True),
        (lambda x, w: F.linear(F.silu(x), w) + 1, False),
        (lambda x, w: F.linear(F.layer_norm(x, (4,)), w), True),
    ],
)
def test_a_block_is_compiled_where_several_operators_may_become_one_kernel(body: Any, fuses: bool) -> None:
    graph = make_fx(body)(torch.randn(2, 4), torch.randn(4, 4)).graph
    assert can_fuse(graph) is fuses

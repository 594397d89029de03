"""Weights that cannot be looked into, or that hooks move, are refused by name before anything is run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import models


class Closed(torch.Tensor):
    """A matrix of bytes that pretends to be one of floats, and does not tell what it is made of."""

    q: torch.Tensor

    @staticmethod
    def __new__(cls, q: torch.Tensor) -> Closed:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)  # type: ignore[no-any-return]

    def __init__(self, q: torch.Tensor) -> None:
        self.q = q

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].q.float(), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Closed(args[0].q)
        raise NotImplementedError(func)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def model() -> nn.Module:
    return nn.Sequential(Layer(), Layer()).eval().requires_grad_(False)


X = torch.ones(2, 8)


def weight(module: nn.Module) -> torch.Tensor:
    return module.get_parameter("1.linear.weight").detach()


def subclass(module: nn.Module) -> None:
    module[1].linear.weight = nn.Parameter(Closed(weight(module).to(torch.int8)), requires_grad=False)  # type: ignore[index]


def sparse(module: nn.Module) -> None:
    module[1].linear.weight = nn.Parameter(weight(module).to_sparse(), requires_grad=False)  # type: ignore[index]


def lazy(module: nn.Module) -> None:
    module[1].linear = nn.LazyLinear(8)  # type: ignore[index]


def attribute(module: nn.Module) -> None:
    module[1].table = Closed(torch.ones(3, 3, dtype=torch.int8))  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (subclass, r"1\.linear\.weight is a .*Closed"),
        (sparse, r"1\.linear\.weight is a sparse"),
        (lazy, r"1\.linear\.weight is a .*UninitializedParameter"),
        (attribute, r"1\.table is a .*Closed"),
    ],
)
def test_odd_weights_are_refused_by_port_and_by_trace(change: Callable[[nn.Module], None], named: str) -> None:
    module = model()
    change(module)
    start = time.perf_counter()
    with pytest.raises(xir.ParallelizeError, match=named):
        xir.port(module)
    with pytest.raises(xir.TraceError, match=named):
        xir.trace(module, (X,))
    assert time.perf_counter() - start < 1


def test_weights_that_become_odd_after_the_first_call_are_refused_too() -> None:
    module = model()
    ported = xir.port(module)
    ported(X)
    subclass(module)
    with pytest.raises(xir.XditError, match="Closed"):
        ported(X)


class CastsItself(nn.Module):
    """Weights in half precision, which forward computes with in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear.float()(x)
        return out


def test_a_module_that_casts_itself_in_forward() -> None:
    module = nn.Sequential(CastsItself(), CastsItself()).eval().requires_grad_(False)
    want = copy.deepcopy(module)(X)
    ported = xir.port(module)
    for _ in range(2):
        assert torch.equal(ported(X), want)
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}, "the model is left as it was"


def test_a_cast_to_the_dtype_that_weights_have_is_none() -> None:
    module = model()
    module[1].linear.register_forward_pre_hook(lambda layer, args: layer.to(torch.float32) and None)  # type: ignore[index]
    assert torch.equal(xir.port(module)(X), module(X))


def test_hooks_of_diffusers_that_move_weights() -> None:
    transformer: Any = models.load("flux.1-dev:tiny")[0]
    ported: Any = xir.port(transformer)
    example = models.load("flux.1-dev:tiny")[1]
    cpu = torch.device("cpu")
    ported.enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    start = time.perf_counter()
    with pytest.raises(xir.ParallelizeError, match="GroupOffloadingHook"):
        xir.port(transformer)
    assert time.perf_counter() - start < 1
    with torch.no_grad(), pytest.raises(xir.TraceError, match="GroupOffloadingHook"):
        ported(**example)


def test_modules_that_others_have_wrapped(tmp_path: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        part = model()
        fully_shard(part[0], mesh=mesh)  # type: ignore[index]
        with pytest.raises(xir.ParallelizeError, match="0 is sharded by FSDP"):
            xir.port(part)
        root = model()
        fully_shard(root, mesh=mesh)
        with pytest.raises(xir.ParallelizeError, match="is sharded by FSDP"):
            xir.port(root)
        shared = nn.parallel.DistributedDataParallel(model().requires_grad_(True))
        with pytest.raises(xir.ParallelizeError, match=r"DistributedDataParallel.*port what it wraps"):
            xir.port(shared)
        split = dist.tensor.distribute_module(model(), mesh)
        with pytest.raises(xir.ParallelizeError, match=r"0\.linear\.weight is a .*DTensor"):
            xir.port(split)
    finally:
        dist.destroy_process_group()


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.library, self.namespaces, self.linear = F, [torch], nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.library.silu(self.linear(x))


def test_python_modules_in_attributes_are_not_walked() -> None:
    module = nn.Sequential(Library(), Library()).eval().requires_grad_(False)
    start = time.perf_counter()
    assert torch.equal(xir.port(module)(X), module(X))
    assert time.perf_counter() - start < 5


def test_recurrent_layers_keep_lists_of_their_weights() -> None:
    """They look whether these have changed, and would write them anew in a copy."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8, batch_first=True)).eval(), torch.randn(2, 5, 4)
    before = model[1]._flat_weights
    result = xir.check(model, (x,), cfg=2)
    assert result.ok, str(result)
    assert model[1]._flat_weights is before

"""Weights that are made of several tensors, or that hooks cast: a program has what they are made of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.wrappers import Hollow

X = torch.linspace(-1, 1, 96).reshape(2, 6, 8)


class Int8(torch.Tensor):
    """A matrix of bytes with a scale for each row, that pretends to be one of floats."""

    q: torch.Tensor
    scale: torch.Tensor
    doubled: bool

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor, doubled: bool = False) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype, device=q.device)  # type: ignore[no-any-return]

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, doubled: bool = False) -> None:
        self.q, self.scale, self.doubled = q, scale, doubled

    @classmethod
    def of(cls, x: torch.Tensor) -> Int8:
        scale = x.abs().amax(1, True) / 127
        return cls((x / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "scale"], {"doubled": self.doubled}

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], options: Any, size: Any, stride: Any) -> Int8:
        return cls(parts["q"], parts["scale"], **options)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten, one = torch.ops.aten, next(arg for arg in args if isinstance(arg, Int8))
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            return Int8(func(one.q, **{**kwargs, "dtype": None} if kwargs else {}), func(one.scale), one.doubled)
        if func is aten.copy_.default:
            one.q.copy_(args[1].q)
            one.scale.copy_(args[1].scale)
            return one
        plain = [arg.q * arg.scale * (2 if arg.doubled else 1) if arg is one else arg for arg in args]
        return func(*plain, **kwargs or {})


class Packed(nn.Parameter):
    """Bytes that a layer unpacks by a factor noted on them, as those of GGUF are by their format."""

    factor = 1.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        made = torch.Tensor._make_subclass(cls, found) if isinstance(found, torch.Tensor) else found
        if isinstance(made, Packed):
            made.factor = next(arg.factor for arg in args if isinstance(arg, Packed))
        return made


class Unpacking(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.weight, Packed):
            return super().forward(input)
        turned = self.weight.t()
        assert isinstance(turned, Packed)
        plain = torch.Tensor._make_subclass(torch.Tensor, turned)
        return input @ (plain.to(input.dtype) * turned.factor) + self.bias


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Unpacking(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).relu()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer(), Layer()).eval().requires_grad_(False)


def opened(module: nn.Module) -> None:
    for layer in module.children():
        layer.linear.weight = nn.Parameter(Int8.of(layer.linear.weight.detach()), requires_grad=False)


def packed(module: nn.Module) -> None:
    for layer in module.children():
        weight = layer.linear.weight.detach() * 64
        layer.linear.weight = Packed(weight.round().to(torch.int8), requires_grad=False)
        layer.linear.weight.factor = 1 / 64


def cast(module: nn.Module) -> None:
    for layer in module.children():
        layer.linear.to(torch.float8_e4m3fn)
        layer.linear.register_forward_pre_hook(lambda layer, args: layer.to(torch.float32) and None)
        layer.linear.register_forward_hook(lambda layer, args, result: layer.to(torch.float8_e4m3fn) and None)


ALL = pytest.mark.parametrize("change", [opened, packed, cast])


@ALL
@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"cfg": 2}, {"ulysses": 2, "shard_weights": True}])
def test_every_rank_gives_the_models_output(change: Any, degrees: dict[str, Any]) -> None:
    module = model()
    change(module)
    traced = xir.trace(module, (X,))
    assert [block.name for block in traced.ir.blocks.values()] == ["Layer"], "layers are alike"
    for output in traced.parallelize(**degrees).simulate(module, (X,)):
        torch.testing.assert_close(output, module(X))


def test_a_program_has_the_parts() -> None:
    module = model()
    opened(module)
    types = {name: str(spec.dtype) for name, spec in xir.trace(module, (X,)).ir.state.items() if name.startswith("0.")}
    assert types == {
        "0.linear.weight.q": "torch.int8",
        "0.linear.weight.scale": "torch.float32",
        "0.linear.bias": "torch.float32",
    }


@ALL
def test_quantised_before_or_after_the_port_and_after_a_call(change: Any) -> None:
    want, module = model(), model()
    ported = xir.port(module)
    assert torch.equal(ported(X), want(X))
    change(want)
    change(ported)
    assert torch.equal(ported(X), want(X))
    assert torch.equal(xir.port(module)(X), want(X))


@ALL
@pytest.mark.parametrize("assign", [False, True])
def test_others_that_are_loaded_take_effect(change: Any, assign: bool) -> None:
    module, other = model(), model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-0.7)
    change(module)
    change(other)
    ported = xir.port(module)
    before = ported(X)
    ported.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(ported(X), other(X)) and not torch.equal(ported(X), before)


@pytest.mark.parametrize("change", [opened, packed])
def test_options_of_a_weight_that_change_are_noticed(change: Any) -> None:
    module = model()
    change(module)
    ported = xir.port(module)
    before = ported(X)
    weight: Any = module.get_parameter("1.linear.weight")
    if change is opened:
        weight.doubled = True
    else:
        weight.factor = 1 / 32
    assert torch.equal(ported(X), module(X)) and not torch.equal(ported(X), before)


@ALL
@pytest.mark.parametrize("options", [{"release": True}, {"shard_weights": True}])
def test_a_model_gives_its_weights_up(change: Any, options: dict[str, bool]) -> None:
    module = model()
    change(module)
    want = module(X)
    ported = xir.port(module, **options)
    assert torch.equal(ported(X), want)
    assert {weight.device.type for weight in module.parameters()} == {"meta"}
    assert {type(weight) for weight in module.parameters()} <= {Hollow, Int8, Packed}


@pytest.mark.parametrize("flat", [False, True])
def test_parts_are_read_from_a_checkpoint(flat: bool, tmp_path: Path) -> None:
    """Under their names, or as torchao flattens state dicts."""
    module = model()
    opened(module)
    want, saved = module(X), {}
    for name, tensor in module.state_dict().items():
        parts = (
            {f".{part}": getattr(tensor, part) for part in ("q", "scale")} if name.endswith("weight") else {"": tensor}
        )
        for part, inner in parts.items():
            path, _, leaf = f"{name}{part}".replace("weight.", "_weight_" if flat else "weight.").rpartition(".")
            saved[f"{path}.{leaf}"] = inner.contiguous()
    save_file(saved, tmp_path / "model.safetensors")
    empty = copy.deepcopy(model()).to("meta")
    opened(empty)
    assert torch.equal(xir.port(empty, weights=tmp_path)(X), want)
    plain = copy.deepcopy(model())
    save_file({name: x.contiguous() for name, x in plain.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(xir.MismatchError, match=r"no tensor '0\.linear\.weight\.\w+' that the program needs"):
        xir.port(empty, weights=tmp_path)(X)

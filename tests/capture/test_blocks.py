"""Blocks are shared exactly when their code is equal."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.capture.blocks import Blocks
from xdit_ir.ir.program import WHERE, Program

Check = Callable[..., Program]


class Layer(nn.Module):
    def __init__(self, width: int = 8, index: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.index = index
        self.inner = nn.Linear(width, width, bias=bias)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        x = x + self.norm(self.inner(x)).relu()
        return x if scale is None else x * scale


class ReadsIndex(Layer):
    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        return super().forward(x) * (2.0 if self.index % 2 else 1.0)


class WritesArgument(Layer):
    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        x += 1
        return super().forward(x)


class Caches(Layer):
    cache: Any = None

    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        if self.cache is None:
            self.cache = torch.arange(x.shape[-1], dtype=x.dtype)
        return super().forward(x) + self.cache


class Splits(Layer):
    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        y = super().forward(x)
        return y[:, :1], y[:, 1:], x, None, [y, {"n": 3}]


class Holder:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class ReadsHolder(Layer):
    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        return super().forward(x) + scale.value


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def calls(program: Program) -> Counter[str]:
    return Counter(str(node.args[0]) for node in program.calls)


X = (torch.randn(2, 3, 8),)


@pytest.mark.parametrize("depth", [2, 5, 9])
def test_one_body_for_any_depth(depth: int, check: Check) -> None:
    program = check(Stack(*(Layer(index=i) for i in range(depth))), X, (torch.randn(2, 3, 8),))
    assert calls(program) == {"Layer": depth}


def test_an_unread_index_is_not_traced_again(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = os.open(tmp_path / "ran", os.O_WRONLY | os.O_CREAT)  # of which a trace sees nothing
    monkeypatch.setattr(Layer, "forward", lambda self, x: x + self.inner(x) if os.write(ran, b".") else x)
    model = Stack(*(Layer(index=i) for i in range(6)))
    program = check(model, X)
    os.close(ran)
    assert len((tmp_path / "ran").read_text()) == 1 + 6
    assert calls(program) == {"Layer": 6}


def test_a_read_index_splits(check: Check) -> None:
    program = check(Stack(*(ReadsIndex(index=i) for i in range(5))), X)
    assert calls(program) == {"ReadsIndex": 3, "ReadsIndex_1": 2}


def test_structure_splits(check: Check) -> None:
    program = check(Stack(Layer(), Layer(), Layer(bias=False)), X)
    assert calls(program) == {"Layer": 2, "Layer_1": 1}


def test_hooks_count(check: Check) -> None:
    model = Stack(Layer(), Layer(), Layer())
    model.layers[1].inner.register_forward_hook(lambda module, args, output: output * 3)
    assert len(check(model, X).blocks) == 2


def test_hooks_of_a_block_stay_outside(check: Check) -> None:
    model = Stack(Layer(), Layer(), Layer())
    model.layers[1].register_forward_hook(lambda module, args, output: output * 3)
    assert calls(check(model, X)) == {"Layer": 3}


def test_side_effects_are_not_shared(check: Check) -> None:
    program = check(Stack(*(Caches() for _ in range(3))), (torch.randn(2, 3, 8).relu(),))
    assert not program.blocks


def test_what_layers_write_to_their_arguments_is_shared(check: Check) -> None:
    program = check(Stack(*(WritesArgument() for _ in range(3))), (torch.randn(2, 3, 8).relu(),))
    assert calls(program) == {"WritesArgument": 3}


def test_what_a_layer_writes_into_memory_of_another_argument_is_not_shared(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                whole = x.clone()
                x = layer(whole[:, 1:], whole[:, :-1]) + whole[:, 1:].sum()
                x = torch.cat([x, x[:, :1]], 1)
            return x

    assert not check(Model(WritesArgument(), WritesArgument()), X).blocks


def test_many_results(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                a, b, same, nothing, (y, rest) = layer(x)
                assert nothing is None and rest == {"n": 3} and same is x
                x = torch.cat([b, a], 1) + y * same
            return x

    assert calls(check(Model(Splits(), Splits()), X)) == {"Splits": 2}


def test_writing_into_shared_results_gives_up_blocks(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                a, _, _, _, (y, _) = layer(x)
                a += 1
                x = x + y
            return x

    assert not check(Model(Splits(), Splits()), X).blocks


def test_writing_into_an_own_result_is_fine(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                x += 1
                x[:, 0] *= 2
            return x

    assert calls(check(Model(Layer(), Layer()), X)) == {"Layer": 2}


def test_arguments(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                x = layer(x, scale=2.0 if index == 1 else temb if index == 2 else None)
            return x

    program = check(Model(*(Layer() for _ in range(4))), (*X, torch.randn(8)))
    assert calls(program) == {"Layer": 2, "Layer_1": 1, "Layer_2": 1}


def test_dead_arguments_are_dropped(check: Check) -> None:
    class Ignores(Layer):
        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x)

    class Model(Stack):
        def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, temb)
            return x

    program = check(Model(Ignores(), Ignores()), (*X, torch.randn(8)))
    assert [len(node.args[2]) for node in program.calls] == [1, 1]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, item: torch.Tensor) -> None:
        self.value = item


@pytest.mark.parametrize(("kind", "count"), [(Holder, 1), (Slotted, 0)])
def test_tensors_in_objects_are_followed_or_inlined(check: Check, kind: Any, count: int) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, kind(x[0] * 2))
            return x

    assert len(check(Model(ReadsHolder(), ReadsHolder()), X).blocks) == count


def test_blocks_that_change_or_return_objects_are_inlined(check: Check) -> None:
    class Passes(ReadsHolder):
        def forward(self, x: torch.Tensor, holder: Any = None) -> Any:
            return super().forward(x, holder), holder

    class Changes(ReadsHolder):
        def forward(self, x: torch.Tensor, holder: Any = None) -> Any:
            x, holder.value = super().forward(x, holder), holder.value + 1
            return x, holder

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            holder = Holder(x[0] * 2)
            for layer in self.layers:
                x, holder = layer(x, holder)
            return x + holder.value

    for kind in (Passes, Changes):
        assert not check(Model(kind(), kind()), X).blocks


def test_a_tensor_put_on_a_block(check: Check) -> None:
    """Its layers are no blocks, and what a caller finds there is of the last call."""

    class Reads(Layer):
        mask: Any = None

        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x) * self.mask

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                layer.mask = x[:1] * 2
                x = layer(x)
            return x

    model = Model(Reads(), Reads())
    program = check(model, X)
    assert not program.blocks
    assert [str(effect.path[-1]) for effect in program.signature.effects] == [".mask", ".mask"]


def test_shared_weights_and_repeated_calls(check: Check) -> None:
    first = Layer()
    second = Layer()
    second.inner = first.inner
    program = check(Stack(first, second, first), X)
    assert calls(program) == {"Layer": 3}
    assert [node.args[1] for node in program.calls] == ["layers.0", "layers.1", "layers.0"]


def test_tied_inside_is_not_untied(check: Check) -> None:
    class Two(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            if tie:
                self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())

    assert len(check(Stack(Two(True), Two(True), Two(False)), X).blocks) == 2


def test_outer_code_may_use_a_blocks_weights(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x.to(layer.inner.weight.dtype)) @ layer.inner.weight
            return x

    assert calls(check(Model(Layer(), Layer()), X)) == {"Layer": 2}


def test_small_bodies_are_inlined(check: Check) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.Sequential(nn.LayerNorm(64), nn.SiLU()) for _ in range(3)])
            self.layers = nn.ModuleList([Layer(64) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = layer(norm(x))
            return x

    program = check(Model(), (torch.randn(5, 64),))
    assert calls(program) == {"Layer": 3}
    assert "norms.1.0" in {node.meta[WHERE].module for node in program.graph.nodes}


def test_containers_are_searched(check: Check) -> None:
    model = nn.Sequential(nn.Sequential(*(Layer() for _ in range(4))), nn.Linear(8, 8))
    assert calls(check(model, X)) == {"Layer": 4}


def test_numbered_attributes(check: Check) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(3):
                setattr(self, f"layer{index}", Layer())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in range(3):
                x = getattr(self, f"layer{index}")(x)
            return x

    assert calls(check(Model(), X)) == {"Layer": 3}


def test_attributes_that_only_some_layers_have(check: Check) -> None:
    class Optional(Layer):
        strength = 2.0

        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            x = super().forward(x) * self.strength
            return -x if getattr(self, "turned", False) else x

    layers = [Optional() for _ in range(4)]
    layers[1].strength, layers[2].turned = 0.5, True
    assert calls(check(nn.Sequential(*layers), X)) == {"Optional": 2, "Optional_1": 1, "Optional_2": 1}


def test_nested_lists_take_the_outermost(check: Check) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](x))

    assert calls(check(Stack(Nested(), Nested(), Nested()), X)) == {"Nested": 3}


def test_per_layer_plain_tensors(check: Check) -> None:
    class Scales(Layer):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.scale = torch.tensor(float(index))

        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x) * self.scale

    check(Stack(*(Scales(i) for i in range(3))), X)


def test_values_of_arguments_that_a_body_reads(check: Check) -> None:
    class Cuts(Layer):
        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x)[:, : int(scale.max())]

    class Model(Stack):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x, n) + self.layers[1](x, n + 0) + self.layers[2](x, n - 1).mean()

    program = check(Model(Cuts(), Cuts(), Cuts()), (*X, torch.tensor([2, 3])))
    assert calls(program) == {"Cuts": 2, "Cuts_1": 1}
    assert [guard.path for guard in program.signature.guards] == ["n"]


def test_autocast_splits(check: Check) -> None:
    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.layers):
                with torch.autocast("cpu", torch.bfloat16, enabled=index == 1):
                    x = layer(x).float()
            return x

    assert calls(check(Model(Layer(), Layer(), Layer()), X)) == {"Layer": 2, "Layer_1": 1}


def test_the_type_of_an_attribute_counts(check: Check) -> None:
    class Typed(Layer):
        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x) * (3 if isinstance(self.index, bool) else self.index)

    check(Stack(Typed(index=1), Typed(index=True), Typed(index=1)), X)


@pytest.mark.parametrize("reads", [False, True])
def test_where_a_single_sample_lies_in_memory_splits_only_what_reads_it(
    reads: bool, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strided(Layer):
        def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
            return super().forward(x, x.stride()[1] if reads else None)

    class Model(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.cat([layer(x), x], 1)[:, : x.shape[1]]
            return x

    traced: list[str] = []
    real = Blocks._trace
    monkeypatch.setattr(
        Blocks, "_trace", lambda self, module, spot, *rest: traced.append(spot[0]) or real(self, module, spot, *rest)
    )
    check(Model(Strided(), Strided(), Strided()), (torch.randn(1, 3, 8),))
    assert traced == (["layers.0", "layers.1"] if reads else ["layers.0"])

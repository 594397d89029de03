"""Kinds of change to a model, to its arguments or around it, each for any model: what they do to a linear layer
that is picked (`World.linear`), to the model, and to the arguments of its next call."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as global_hooks
from torch.utils._pytree import tree_map_only

FACTOR = {"global": 1.0}


@dataclass(eq=False)
class World:
    """A model, its arguments, how it is called, and what must be undone at the end."""

    model: nn.Module
    example: dict[str, Any]
    linear: nn.Linear
    block: nn.Module
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    undo: ExitStack = field(default_factory=ExitStack)
    factors: dict[str, Any] = field(default_factory=lambda: {"list": [1.0], "object": types.SimpleNamespace(by=1.0)})
    positional: int = 0

    def patch(self, holder: Any, name: str, value: Any) -> None:
        """Set an attribute until the end."""
        self.undo.callback(setattr, holder, name, getattr(holder, name))
        setattr(holder, name, value)

    def tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the floating-point tensors with a batch among the arguments."""
        some = lambda x: change(x) if x.is_floating_point() and x.dim() > 2 else x  # noqa: E731
        self.example = tree_map_only(torch.Tensor, some, self.example)


Change = Callable[[World], Any]
CHANGES: dict[str, Change] = {}


def change(how: Change) -> Change:
    CHANGES[how.__name__.replace("_", " ")] = how
    return how


class Tripled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 3


class Hook:
    def __init__(self, by: Any) -> None:
        self.by, self.slots = by, {"a": 1.0}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * self.by.by * self.slots["a"]


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * FACTOR["global"] if isinstance(output, torch.Tensor) else output


def of_weights(name: str, how: Change) -> None:
    CHANGES[name] = how


of_weights("weight in place", lambda w: w.linear.weight.detach().mul_(1.1))
of_weights("weight through data", lambda w: w.linear.weight.data.mul_(0.9))
of_weights("weight through NumPy", lambda w: w.linear.weight.detach().numpy().__imul__(1.05))
of_weights("state dict", lambda w: w.model.load_state_dict({k: v * 1.01 for k, v in w.model.state_dict().items()}))
of_weights("another parameter", lambda w: setattr(w.linear, "weight", nn.Parameter(w.linear.weight.detach() * 1.1)))
of_weights("no bias", lambda w: setattr(w.linear, "bias", None))
of_weights("a bias", lambda w: setattr(w.linear, "bias", nn.Parameter(torch.randn(w.linear.out_features))))
of_weights("requires grad", lambda w: w.model.requires_grad_(requires_grad=False))
of_weights("spectral", lambda w: nn.utils.parametrizations.weight_norm(w.linear))
of_weights(
    "strides", lambda w: setattr(w.linear, "weight", nn.Parameter(w.linear.weight.detach().t().contiguous().t()))
)
of_weights("another attribute", lambda w: setattr(w.linear, "extra", [1, {2}]))
of_weights("mode", lambda w: w.block.train(not w.block.training))
of_weights("norms", lambda w: [setattr(m, "eps", 1e-2) for m in w.model.modules() if hasattr(m, "eps")])


@change
def tied(w: World) -> None:
    same = [m for m in w.model.modules() if isinstance(m, nn.Linear) and m.weight.shape == w.linear.weight.shape]
    same[-1].weight = same[0].weight


@change
def untied(w: World) -> None:
    for module in w.model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape == w.linear.weight.shape:
            module.weight = nn.Parameter(module.weight.detach() * 1.02)


@change
def forward_of_a_layer(w: World) -> None:
    weight = w.linear
    weight.forward = lambda x: F.linear(x, weight.weight, weight.bias) * 1.5  # type: ignore[method-assign]


@change
def forward_wrapped(w: World) -> None:
    old = w.linear.forward
    w.linear.forward = functools.wraps(old)(lambda x: old(x) * w.factors["list"][0] * 1.2)  # type: ignore[method-assign]


@change
def forward_as_a_method(w: World) -> None:
    w.linear.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) + 0.1, w.linear)  # type: ignore[method-assign]


@change
def forward_partial(w: World) -> None:
    w.linear.forward = functools.partial(lambda by, x: nn.Linear.forward(w.linear, x) * by, 0.8)  # type: ignore[method-assign]


@change
def forward_restored(w: World) -> None:
    w.linear.__dict__.pop("forward", None)


@change
def forward_of_the_model(w: World) -> None:
    old = w.model.forward
    w.model.forward = functools.wraps(old)(lambda *a, **k: old(*a, **k))  # type: ignore[method-assign]


@change
def a_hook(w: World) -> None:
    w.linear.register_forward_hook(lambda module, args, output: output * 1.3)


@change
def a_hook_before(w: World) -> None:
    w.linear.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 0.9,), kwargs), with_kwargs=True)


@change
def a_hook_with_a_closure(w: World) -> None:
    factors = w.factors
    w.linear.register_forward_hook(lambda module, args, output: output * factors["list"][0])


@change
def what_the_closure_holds(w: World) -> None:
    w.factors["list"][0] += 0.25


@change
def a_hook_object(w: World) -> None:
    w.linear.register_forward_hook(Hook(w.factors["object"]))


@change
def what_the_hook_object_holds(w: World) -> None:
    w.factors["object"].by += 0.25


@change
def a_hook_with_a_global(w: World) -> None:
    w.linear.register_forward_hook(doubled)


@change
def the_global(w: World) -> None:
    w.undo.callback(FACTOR.update, {"global": FACTOR["global"]})
    FACTOR["global"] += 0.5


@change
def no_hooks(w: World) -> None:
    w.linear._forward_hooks.clear()


@change
def other_hooks(w: World) -> None:
    w.linear._forward_hooks = type(w.linear._forward_hooks)()


@change
def a_hook_of_all_modules(w: World) -> None:
    hook = lambda module, args, output: output * 1.1 if module is w.linear else None  # noqa: E731
    w.undo.callback(global_hooks.register_module_forward_hook(hook).remove)


@change
def a_tap(w: World) -> None:
    """What comes out of a layer is left in an attribute, in each call anew."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        module.tapped = output

    w.linear.register_forward_hook(keep)


@change
def a_hook_that_does_nothing(w: World) -> None:
    w.block.register_forward_hook(lambda *_: None)


@change
def another_class(w: World) -> None:
    if type(w.linear) is nn.Linear:
        w.linear.__class__ = Tripled


@change
def forward_of_the_class(w: World) -> None:
    kind, old = type(w.block), type(w.block).forward
    w.patch(kind, "forward", functools.wraps(old)(lambda self, *a, **k: old(self, *a, **k)))


@change
def attention_of_torch(w: World) -> None:
    old = F.scaled_dot_product_attention
    w.patch(F, "scaled_dot_product_attention", functools.wraps(old)(lambda *a, **k: old(*a, **k) * 1.05))


@change
def a_layer_replaced(w: World) -> None:
    for parent in w.model.modules():
        for name, child in parent.named_children():
            if child is w.linear:
                made = copy.deepcopy(child)
                made.weight.data.mul_(1.2)
                w.linear = made
                setattr(parent, name, made)
                return


@change
def layers_swapped(w: World) -> None:
    for module in w.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and type(module[0]) is type(module[1]):
            module[0], module[1] = module[1], module[0]
            return


@change
def another_activation(w: World) -> None:
    for parent in w.model.modules():
        for name, child in parent.named_children():
            if type(child) in (nn.SiLU, nn.GELU):
                setattr(parent, name, nn.Tanh())
                return


@change
def an_adapter(w: World) -> None:
    down = nn.Linear(w.linear.in_features, 2)
    up = nn.Linear(2, w.linear.out_features)
    w.linear.add_module("down", down)
    w.linear.register_forward_hook(lambda module, args, output: output + up(down(args[0])))


of_weights("other values", lambda w: w.tensors(torch.randn_like))
of_weights("arguments in place", lambda w: w.tensors(lambda x: x.mul_(1.1)))
of_weights("arguments through NumPy", lambda w: w.tensors(lambda x: [x.numpy().__imul__(1.1), x][1]))
of_weights("arguments through data", lambda w: w.tensors(lambda x: [x.data.add_(0.1), x][1]))
of_weights("other strides", lambda w: w.tensors(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)))
of_weights("negated views", lambda w: w.tensors(lambda x: x.flip(-1)))
of_weights("inference tensors", lambda w: w.tensors(in_inference))
of_weights("other order", lambda w: setattr(w, "example", dict(reversed(list(w.example.items())))))
of_weights("another result", lambda w: w.example.update(return_dict=not w.example.get("return_dict", False)))
of_weights("twice the batch", lambda w: setattr(w, "example", tree_map_only(torch.Tensor, twice, w.example)))
of_weights("autocast", lambda w: setattr(w, "around", lambda: torch.autocast("cpu", torch.bfloat16)))
of_weights("no autocast", lambda w: setattr(w, "around", nullcontext))
of_weights("inference mode", lambda w: setattr(w, "around", torch.inference_mode))
of_weights(
    "default dtype",
    lambda w: [w.undo.callback(torch.set_default_dtype, torch.float32), torch.set_default_dtype(torch.float64)],
)
of_weights("gradients", lambda w: setattr(w, "around", torch.enable_grad))
of_weights("one kernel of attention", lambda w: setattr(w, "around", lambda: sdpa_kernel(SDPBackend.MATH)))
of_weights(
    "deterministic",
    lambda w: [
        w.undo.callback(torch.use_deterministic_algorithms, mode=False),
        torch.use_deterministic_algorithms(mode=True, warn_only=True),
    ],
)
of_weights("seed", lambda w: torch.manual_seed(len(w.example)))


def in_inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def twice(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.dim() else x

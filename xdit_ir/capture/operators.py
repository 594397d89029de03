"""Facts about ATen overloads, read off their schemas: what they write or alias, their functional twins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from xdit_ir.ir.draws import dropout_arguments, is_random

aten = torch.ops.aten

DEVICE = torch.ops.prim.device.default
IDENTITY = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default})
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
MAYBE_WHOLE = frozenset({aten.slice.Tensor, aten.expand.default, aten.reshape.default})
OWN = frozenset({"aten", "prims"})  # namespaces whose composite operators there are rules for
READS = frozenset({aten.item.default, aten._local_scalar_dense.default, aten.is_nonzero.default})
COMPARES = frozenset({aten.equal.default, aten.allclose.default})
_SHAPE_ONLY = frozenset(
    (
        *(getattr(aten, f"{name}_like").default for name in ("zeros", "ones", "full", "empty")),
        *(getattr(aten, f"new_{name}").default for name in ("zeros", "ones", "full", "empty")),
    )
)


@dataclass(frozen=True)
class OpFacts:
    """`composite`: decomposes into others; `aliases`: results may be views; `writes`: arguments written;
    `random`: it draws random numbers; `draws`: the arguments that, if set, make it drop elements at random;
    `shape_only`: its result does not depend on the contents of its tensor arguments.
    """

    composite: bool
    aliases: bool
    writes: tuple[str, ...]
    random: bool
    draws: tuple[str, ...]
    shape_only: bool
    out: tuple[str, ...]


@cache
def facts(func: Any) -> OpFacts:
    """The facts about an overload."""
    schema = func._schema
    writes = tuple(arg.name for arg in schema.arguments if arg.alias_info is not None and arg.alias_info.is_write)
    aliases = not writes and any(ret.alias_info is not None for ret in schema.returns)
    composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    out = tuple(arg.name for arg in schema.arguments if arg.is_out)
    draws = dropout_arguments(func)
    return OpFacts(composite, aliases, writes, is_random(func), draws, func in _SHAPE_ONLY, out)


def argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The value of a named argument of an overload in a call."""
    for position, arg in enumerate(func._schema.arguments):
        if arg.name == name:
            if position < len(args):
                return args[position]
            return kwargs.get(name, arg.default_value if arg.has_default_value() else None)
    return None


def drops_elements(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is a dropout that is switched on."""
    draws = facts(func).draws
    return bool(draws) and all(argument(func, args, kwargs, name) for name in draws)


@cache
def functional_twin(func: Any) -> Any:
    """The overload that computes what `func` writes, or None: `add.Tensor` for `add_.Tensor`, `add.out`."""
    namespace, _, name = func._schema.name.partition("::")
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    wanted = [(arg.name, str(arg.type)) for arg in func._schema.arguments if not arg.is_out]
    for candidate in (base, f"{base}_functional"):
        packet = getattr(getattr(torch.ops, namespace), candidate, None)
        for overload in packet.overloads() if packet is not None else ():
            twin = getattr(packet, overload)
            if not facts(twin).writes and [(arg.name, str(arg.type)) for arg in twin._schema.arguments] == wanted:
                return twin
    return None


def left_out(func: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The defaults of an overload that its functional twin does not have, of arguments behind `args`."""
    needed = {arg.name for arg in functional_twin(func)._schema.arguments if not arg.has_default_value()}
    rest = func._schema.arguments[len(args) :]
    return {arg.name: arg.default_value for arg in rest if arg.name in needed and arg.has_default_value()}

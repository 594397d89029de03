"""Operators that no rule knows, as the operators of which PyTorch makes them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx

from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import bound_arguments, operands, with_operands
from xdit_ir.ir.program import SPEC, TensorSpec
from xdit_ir.passes.emit import Emitter
from xdit_ir.rules import rule_for

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def differences(graph: fx.Graph, node: fx.Node) -> bool:
    """What neighbours differ by, as all but the first less all but the last: windows of two, of which ranks make
    their own."""
    if node.target is not aten.diff.default:
        return False
    given = bound_arguments(node)
    size = given["self"].meta[SPEC].shape[given["dim"]]
    if given["n"] != 1 or given["prepend"] is not None or given["append"] is not None or not size:
        return False
    if given["self"].meta[SPEC].dtype == torch.bool:
        return False
    emitter, dim = Emitter(graph, node), given["dim"]
    later, earlier = (emitter.emit(aten.slice.Tensor, given["self"], dim, a, a + size - 1) for a in (1, 0))
    node.replace_all_uses_with(emitter.emit(aten.sub.Tensor, later, earlier))
    return True


def taken_apart(graph: fx.Graph, node: fx.Node) -> bool:
    """Losses, quantiles and the like: where each operator that they are made of has a rule; others stay one."""
    make = _maker(node)
    if make is None:
        return False
    parts = _traced(node, make)
    if parts is None or not all(map(_is_known, parts.nodes)):
        return False
    emitter, sources = Emitter(graph, node), iter(operands(node))
    env: dict[fx.Node, Any] = {}
    for part in parts.nodes:
        if part.op == "placeholder":
            env[part] = next(sources)
        elif part.target is operator.getitem and not isinstance(env[part.args[0]], fx.Node):
            env[part] = env[part.args[0]][part.args[1]]
        elif part.op == "call_function":
            args, kwargs = fx.map_arg((part.args, part.kwargs), env.__getitem__)
            env[part] = emitter.emit(part.target, *args, **kwargs)
    result = env[parts.output_node().args[0]]  # type: ignore[index]
    if result.meta[SPEC] != node.meta[SPEC]:
        return False
    node.replace_all_uses_with(result)
    return True


def _maker(node: fx.Node) -> Callable[..., Any] | None:
    """What makes the one result of an operator of PyTorch that no rule knows."""
    target: Any = node.target
    single = isinstance(node.meta.get(SPEC), TensorSpec) and bool(operands(node))
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not single:
        return None
    if rule_for(target) is not None or is_random(target) or target._schema.is_mutable:
        return None
    composite = target.has_kernel_for_dispatch_key(COMPOSITE)
    return target.decompose if composite else decomposition_table.get(target)


def _traced(node: fx.Node, make: Callable[..., Any]) -> fx.Graph | None:
    """The operators that it calls for operands of these types; None where it must know what these hold."""
    specs = [source.meta[SPEC] for source in operands(node)]
    if not all(isinstance(spec, TensorSpec) for spec in specs):
        return None

    def call(*tensors: torch.Tensor) -> Any:
        args, kwargs = with_operands(node, tensors)
        return make(*args, **kwargs)

    try:
        made = make_fx(call)(*(torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return made.graph


def _is_known(part: fx.Node) -> bool:
    """Whether a rule knows it, and it makes nothing on the device on which it was traced."""
    if part.op in ("placeholder", "output") or part.target is operator.getitem:
        return True
    known = part.op == "call_function" and rule_for(part.target) is not None and not is_random(part.target)
    return known and part.kwargs.get("device") is None

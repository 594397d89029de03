"""Integers and masks that follow from constants, sizes and guarded inputs: what indices are, whoever computes them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import arguments_of, operands, placeholders
from xdit_ir.ir.guards import STATE
from xdit_ir.ir.program import CONSTANT, SPEC, Program, TensorSpec, call_parts, called_block, is_block_call

aten = torch.ops.aten
Known = dict[fx.Node, torch.Tensor]
_NUMEL = 1 << 20
_SORTS = (aten.sort, aten.argsort, aten.topk, aten.msort)
_WHOLE_NUMBERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def known_integers(program: Program) -> Known:
    """The contents of integer values, on the CPU: in blocks, where all calls hand on the same."""
    guards = {guard.path: guard.value for guard in program.signature.guards if isinstance(guard.value, torch.Tensor)}
    state = {f"{CONSTANT}.{name}": value for name, value in program.constants.items()}
    state |= {path.removeprefix(STATE): value for path, value in guards.items() if path.startswith(STATE)}
    paths = [leaf.path for leaf in program.signature.leaves if leaf.spec is not None]
    given = dict(zip(placeholders(program.graph), paths, strict=False))
    known = {node: guards[path] for node, path in given.items() if path in guards}
    _follow(program.graph, known, state)
    for name, block in program.blocks.items():
        calls = [call_parts(n).values for n in program.graph.nodes if is_block_call(n) and called_block(n) == name]
        arguments = arguments_of(block.graph)
        for place, argument in enumerate(arguments):
            handed = [known.get(values[place]) for values in calls]
            if handed and handed[0] is not None and all(one is not None and one.equal(handed[0]) for one in handed):
                known[argument] = handed[0]
        _follow(block.graph, known, state)
    return known


def _follow(graph: fx.Graph, known: Known, state: dict[str, torch.Tensor]) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in state:
            known[node] = state[str(node.target)].detach().cpu()
        elif node.op == "call_function" and _is_whole(node):
            made = _computed(node, known)
            if made is not None:
                known[node] = made
    for node in [node for node in graph.nodes if node in known and known[node].dtype not in _WHOLE_NUMBERS]:
        del known[node]


def _is_whole(node: fx.Node) -> bool:
    """Whether a node's value is of integers, and not too long."""
    spec = node.meta[SPEC]
    return isinstance(spec, TensorSpec) and spec.dtype in _WHOLE_NUMBERS and math.prod(spec.shape) <= _NUMEL


def _computed(node: fx.Node, known: Known) -> torch.Tensor | None:
    """What a node gives; None where that is not known, or not determined, as the order of equal elements."""
    if node.target is operator.getitem:
        results = _called(operands(node)[0], known)
        place: Any = node.args[1]
        return results[place] if isinstance(results, (tuple, list)) else None
    made = _called(node, known)
    return made if isinstance(made, torch.Tensor) else None


def _called(node: fx.Node, known: Known) -> Any:
    """What one of PyTorch's operators gives for known integers, if it draws no random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not all(one in known for one in operands(node)):
        return None
    given: Any = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    args, kwargs = given[0], dict(given[1])
    ties = target.overloadpacket in _SORTS and args[0].unique().numel() < args[0].numel()
    if is_random(target) or (ties and not kwargs.get("stable")):
        return None
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    try:
        return target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None

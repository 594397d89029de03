"""What a rank does at a buffer: functions of the persistent tensor, which code gets as an argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from xdit_ir.ir import buffer_ops as buffers
from xdit_ir.ir.buffer_ops import Keep, Places, Read, Recall, Slot, Write
from xdit_ir.ir.program import SPEC, TensorSpec


def slot_spec(node: fx.Node) -> TensorSpec | None:
    """The type of the buffer that a node fills; None if it only reads it."""
    if isinstance(node.target, Write):
        return TensorSpec(node.target.shape, node.meta[SPEC].dtype)
    return node.meta[SPEC] if isinstance(node.target, Keep) else None


def slot_call(graph: fx.Graph, node: fx.Node, buffer: fx.Node, values: Sequence[fx.Node]) -> fx.Node:
    """The node that does on `buffer` what the operator of a pipeline does."""
    target = node.target
    assert isinstance(target, Slot)
    if isinstance(target, Write):
        if 0 in node.meta[SPEC].shape:
            return values[0]
        return graph.create_node("call_function", write_part, (buffer, values[0], target.places), name=node.name)
    if isinstance(target, Keep):
        return graph.create_node("call_function", keep_value, (buffer, values[0]), name=node.name)
    if isinstance(target, Recall):
        return graph.create_node("call_function", torch.clone, (buffer,), name=node.name) if _leaves(node) else buffer
    assert isinstance(target, Read)
    args = (buffer, target.places, target.summed, _leaves(node))
    return graph.create_node("call_function", read_parts, args, name=node.name)


def write_part(buffer: torch.Tensor, value: torch.Tensor, places: Places) -> torch.Tensor:
    """Put a patch's part in its place, and go on with it; of a pending sum: in its slot `[1, *value.shape]`."""
    buffers.write(buffer, value[None] if value.dim() < buffer.dim() else value, places)
    return value


def keep_value(buffer: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Remember a value for the patches behind this one."""
    buffer.copy_(value)
    return value


def read_parts(buffer: torch.Tensor, places: Places, summed: bool, copied: bool) -> torch.Tensor:
    """What a patch wants of the buffer; not `copied`, it may be the buffer itself, which the next patch changes."""
    result = buffers.read_places(buffer, places, summed=summed)
    return result.clone() if copied and not summed else result


def _leaves(node: fx.Node) -> bool:
    """Whether what a node gives may be returned as it is, or as a view, and so outlive this run."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen and _may_alias(user):
                seen.add(user)
                todo.append(user)
    return False


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    copies = schema is not None and not any(one.alias_info is not None for one in schema.returns)
    return not copies or schema.name in ("aten::reshape", "aten::contiguous", "aten::to")  # type: ignore[union-attr]

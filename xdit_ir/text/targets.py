"""Operators by name: ours first, then ATen's, others with their namespace; and what targets of a rank are made of."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch

from xdit_ir.errors import ParseError
from xdit_ir.ir import ops, window_ops
from xdit_ir.ir.buffer_ops import Keep, Read, Recall, Write
from xdit_ir.ir.collective_ops import AllGather, PeerExchange, Reduce, ReduceScatter, Reshuffle, Ring, Together
from xdit_ir.ir.partial_attention import merge_partials, partial_attention
from xdit_ir.ir.printer import target_name
from xdit_ir.ir.relayout import Landing, Piece, RankExchange
from xdit_ir.ir.resampling import resampled
from xdit_ir.kernels.attention import KernelAttention
from xdit_ir.kernels.linear_gelu import linear_gelu
from xdit_ir.kernels.write_slice import write_slice

OURS = {
    name: function
    for module in (ops, window_ops)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
} | {
    function.__name__: function for function in (linear_gelu, merge_partials, partial_attention, resampled, write_slice)
}
# Targets of a rank's program, and their parts: written as `Name{field: value, ...}`.
_TARGETS: tuple[type[Any], ...] = (
    *(Reshuffle, AllGather, PeerExchange, Together, Reduce, ReduceScatter, Ring, KernelAttention),
    *(Read, Write, Keep, Recall),
)
RECORDS = {one.__name__: one for one in (*_TARGETS, RankExchange, Piece, Landing)}


def target_text(target: Any) -> str | None:
    """`add.Tensor`, `take`, `aten::take`, or None for what has no name that leads back to it."""
    name = target_name(target)
    if OURS.get(name) is target:
        return name
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return name if target.namespace == "aten" and name not in OURS else f"{target.namespace}::{name}"


def is_target(found: Any) -> bool:
    """Whether a record, or an attachment, is something that a node can call."""
    return isinstance(found, _TARGETS) or (callable(found) and not isinstance(found, (type, torch.Tensor)))


def _packet(namespace: str, name: str) -> Any:
    """The operator of this name with all its overloads; None for whatever else `torch.ops` has."""
    space = getattr(torch.ops, namespace, None)
    found = getattr(space, name, None) if isinstance(space, torch._ops._OpNamespace) else None
    return found if isinstance(found, torch._ops.OpOverloadPacket) else None


def resolve(name: str, line: int) -> Any:
    """The operator of this name; raises `ParseError` naming the nearest one there is."""
    if name in OURS:
        return OURS[name]
    namespace, _, rest = name.rpartition("::")
    packet_name, _, overload = rest.partition(".")
    packet = _packet(namespace or "aten", packet_name)
    if packet is None:
        near = difflib.get_close_matches(packet_name, [*OURS, *dir(torch.ops.aten)], n=1)
        raise ParseError(f"line {line}: there is no operator {name!r}" + (f"; nearest: {near[0]}" if near else ""))
    found = getattr(packet, overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ParseError(f"line {line}: {packet_name} has no overload {overload!r}; there are {packet.overloads()}")
    return found

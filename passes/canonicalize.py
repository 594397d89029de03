"""`canonicalize`: one form for each thing, without changing what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.facts import Fact
from xdit_ir.ir.graphs import bound_arguments, map_graphs, remove_dead
from xdit_ir.ir.program import SPEC, Program
from xdit_ir.passes.emit import Emitter
from xdit_ir.passes.extremes import extreme_of_rows, extreme_without_place
from xdit_ir.passes.find_tokens import PADS
from xdit_ir.passes.given_back import is_needed
from xdit_ir.passes.patches import (
    patches_of_convolution,
    patches_of_fold,
    patches_of_transposed,
    patches_of_unfold,
    windows_of_fold,
    windows_of_unfold,
)
from xdit_ir.passes.short_time import frames_of_sound, sound_of_frames
from xdit_ir.passes.taken_apart import differences, taken_apart
from xdit_ir.passes.unbound import unbind_selected
from xdit_ir.passes.views import PERMUTES, VIEWS, source_of_chain
from xdit_ir.passes.whole_pools import pool_of_everything
from xdit_ir.passes.written import joined_from_pieces

aten = torch.ops.aten
COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)


@dataclass(frozen=True)
class Canonicalize:
    """Drop copies, no-op casts, pads of nothing and factors of 1, collapse view chains, write convolutions that make
    tokens of patches, or patches of tokens, as matrix products, `unfold` and `fold` of windows side by side as views,
    attention as one `attention` operator, the largest element of a tensor as that of its rows, and operators that no
    rule knows as those of which PyTorch makes them, where rules know these. What loops take
    apart row by row is taken apart at once, and what is written piece by piece until it is full is joined from the
    pieces.
    """

    name: ClassVar[str] = "canonicalize"
    numerics: ClassVar[str] = "reassociated"
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})

    def apply(self, program: Program) -> Program:
        """The canonical program."""
        return map_graphs(program, _canonicalize)


def _canonicalize(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for rewrite in (
            _drop_copy,
            _type_as,
            _dense,
            _empty_parts,
            _padded,
            patches_of_convolution,
            patches_of_transposed,
            patches_of_unfold,
            patches_of_fold,
            windows_of_unfold,
            windows_of_fold,
            pool_of_everything,
            frames_of_sound,
            sound_of_frames,
            _attention,
            _collapse_views,
            _reshape,
            extreme_without_place,
            extreme_of_rows,
            differences,
            taken_apart,
            joined_from_pieces,
        ):
            if rewrite(graph, node):
                break
    unbind_selected(graph)
    remove_dead(graph)


def _drop_copy(graph: fx.Graph, node: fx.Node) -> bool:
    same = node.target is aten._to_copy.default and _is_noop_cast(node)
    idle = node.target is aten.dropout.default and not (node.args[1] and node.args[2])
    idle |= node.target in PADS and not any(node.args[1])  # type: ignore[arg-type]
    if node.target not in COPIES and not same and not idle and not _is_by_one(node):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if is_needed(node, source):
        return False
    node.replace_all_uses_with(source)
    return True


def _is_noop_cast(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.meta[SPEC].dtype == node.meta[SPEC].dtype and node.kwargs.get("device") is None


def _is_by_one(node: fx.Node) -> bool:
    """Whether it scales by 1; of complex numbers that changes those which are not finite."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or type(node.args[1]) not in (int, float):
        return False
    source, spec = node.args[0], node.meta[SPEC]
    same = isinstance(source, fx.Node) and source.meta[SPEC] == spec and not spec.dtype.is_complex
    return same and bool(node.args[1] == 1)


def _type_as(graph: fx.Graph, node: fx.Node) -> bool:
    """Only the dtype of the second operand matters, and that is known."""
    if node.target is not aten.type_as.default:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta[SPEC].dtype == node.meta[SPEC].dtype:
        node.replace_all_uses_with(source)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": node.meta[SPEC].dtype}
    return True


def _dense(graph: fx.Graph, node: fx.Node) -> bool:
    """Operators that read memory as another type, and products of few bits, need dense strides, which no other operator
    promises."""
    if node.target not in (aten.view_as_complex.default, aten.view.dtype, aten._scaled_mm.default):
        return False
    source, emitter = node.args[0], Emitter(graph, node)
    assert isinstance(source, fx.Node)
    if node.target is aten._scaled_mm.default:
        dense = emitter.emit(aten.contiguous.default, source)
    else:
        dense = emitter.emit(aten.clone.default, source, memory_format=torch.contiguous_format)
    node.replace_input_with(source, dense)
    return True


def _empty_parts(graph: fx.Graph, node: fx.Node) -> bool:
    """A join of one part and empty ones is that part."""
    if node.target is not aten.cat.default:
        return False
    parts: Any = node.args[0]
    filled = [part for part in parts if 0 not in part.meta[SPEC].shape]
    if len(filled) != 1 or filled[0].meta[SPEC] != node.meta[SPEC] or is_needed(node, filled[0]):
        return False
    node.replace_all_uses_with(filled[0])
    return True


def _padded(graph: fx.Graph, node: fx.Node) -> bool:
    """`pad_sequence`: every sequence padded behind to the length of the longest, then stacked."""
    if node.target is not aten.pad_sequence.default:
        return False
    given = bound_arguments(node)
    if given["padding_side"] != "right":
        return False
    emitter, parts = Emitter(graph, node), []
    length = max(part.meta[SPEC].shape[0] for part in given["sequences"])
    for part in given["sequences"]:
        own, *rest = part.meta[SPEC].shape
        if own < length:
            amounts = [0] * (2 * len(rest)) + [0, length - own]
            part = emitter.emit(aten.constant_pad_nd.default, part, amounts, given["padding_value"])
        parts.append(part)
    dim = 0 if given["batch_first"] else 1
    node.replace_all_uses_with(emitter.emit(aten.stack.default, parts, dim))
    return True


def _attention(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    given = bound_arguments(node)
    kwargs = {"mask": given["attn_mask"], "scale": given["scale"]}
    kwargs |= {"is_causal": given["is_causal"], "enable_gqa": given.get("enable_gqa", False)}
    kwargs = {key: value for key, value in kwargs.items() if value not in (None, False) or isinstance(value, fx.Node)}
    node.replace_all_uses_with(Emitter(graph, node).emit(ops.attention, *node.args[:3], name="attention", **kwargs))
    return True


def _collapse_views(graph: fx.Graph, node: fx.Node) -> bool:
    if node.target not in VIEWS + PERMUTES:
        return False
    source = source_of_chain(node)
    if source is None:
        return False
    if source.meta[SPEC].shape == node.meta[SPEC].shape:
        node.replace_all_uses_with(source)
        return True
    if source is node.args[0] and node.target in VIEWS:
        return False
    new = Emitter(graph, node).reshape(source, node.meta[SPEC].shape)
    node.replace_all_uses_with(new)
    return True


def _reshape(graph: fx.Graph, node: fx.Node) -> bool:
    """Strides are not part of the IR, so every view may have to copy."""
    if node.target not in (aten.view.default, aten._unsafe_view.default):
        return False
    node.target = aten.reshape.default
    return True

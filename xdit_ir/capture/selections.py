"""Rows that a mask selects whose contents cannot be known: all rows are computed, and kept where the mask is set.

So `if mask.any(): x[mask] += f(x[mask])` is captured. It is right where every row is computed by itself, which is seen
operator by operator, and where the branch does nothing else, which `trace` makes sure of: with a mask taken to be empty
the same must be computed as when the branch is not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.capture.operators import RESHAPES, argument, aten, facts
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.selected import NUMBER, Selections
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import TracedValue
from xdit_ir.ir.program import SPEC
from xdit_ir.reflection.tensors import tensors_in

_FEW = 64
_MASKS = 8  # of which Python asks whether they are empty; each is one more trace
PUTS = frozenset({aten.index_put_.default, aten.index_put.default})
_CHECKS = {aten.gt.Scalar: 0, aten.ne.Scalar: 0, aten.ge.Scalar: 1, aten.eq.Scalar: 0, aten.lt.Scalar: 1}
_COUNTS = frozenset({aten.sum.default, aten.count_nonzero.default})
_NOT = frozenset({aten.logical_not.default, aten.bitwise_not.default})
_BY_DIM = frozenset(
    getattr(aten, name)
    for name in ("slice", "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "narrow",
                 "softmax", "_softmax", "log_softmax", "_log_softmax", "sum", "mean", "amax", "amin", "cat", "stack",
                 "linalg_vector_norm", "var", "std", "flip", "cumsum", "unflatten")
)  # fmt: skip
_NORMS = frozenset({aten.layer_norm, aten.rms_norm, aten.native_layer_norm})
_SAME = frozenset({aten._to_copy, aten.clone, aten.dropout, aten.alias, aten.detach, aten.gelu, aten.silu, aten.prelu})


def is_selecting(recorder: Recorder, func: Any, args: Any) -> bool:
    """Whether an operator reads or writes `x[mask]` with a mask of unknown contents in front."""
    if func is not aten.index.Tensor and func not in PUTS:
        return False
    mask, *others = args[1]
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool or recorder.value(mask).known is not None:
        return False
    many = mask.dim() > 1 or mask.numel() > _FEW  # of few, such as samples, it may be a fact about the inputs
    return many and all(other is None for other in others)


def select(recorder: Recorder, args: Any, record: Callable[..., Any]) -> torch.Tensor:
    """All rows, in place of those that are selected: `[numel of the mask, ...]`."""
    found, (x, (mask, *_)) = _found(recorder), args
    if found.of((x, mask)):
        refuse(recorder, "selects among rows that a mask selects")
    number, found.place = found.number(recorder.node(mask)), found.place or source_line()
    rows: torch.Tensor = record(aten.reshape.default, x, [mask.numel(), *x.shape[mask.dim() :]])
    rows = record(aten.clone.default, rows)
    found.rows[id(rows)] = rows, number
    return rows


def put(recorder: Recorder, func: Any, args: Any, kwargs: Any, record: Callable[..., Any]) -> torch.Tensor:
    """Write rows where the mask is set."""
    found, (x, (mask, *_), values) = _found(recorder), args[:3]
    number, rest = found.number(recorder.node(mask)), x.shape[mask.dim() :]
    own, foreign = found.of(values), found.of((x, mask))
    if foreign or own - {number} or argument(func, args, kwargs, "accumulate"):
        refuse(recorder, "writes rows that a mask selects where another one does, or adds them up")
    if own:
        kept, found.rows = found.rows, {}  # from here on they are in their places
        values = record(aten.reshape.default, values, [*mask.shape, *values.shape[1:]])
        found.rows = kept
    elif values.dim() > len(rest):
        if values.shape[0] != 1:
            refuse(recorder, "writes rows by a mask that are not selected by it")
        values = record(aten.reshape.default, values, list(values.shape[1:]))
    where = record(aten.reshape.default, mask, [*mask.shape, *(1 for _ in rest)])
    made: torch.Tensor = record(aten.where.self, where, values, x)
    recorder.node(made).meta[NUMBER] = number
    return record(aten.copy_.default, x, made) if func is aten.index_put_.default else made


def follow(recorder: Recorder, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Note results that are selected rows; raise `Opaque` where rows are not computed one by one."""
    numbers = recorder.selections.of((args, kwargs)) if recorder.selections is not None else set()
    if not numbers:
        return
    if len(numbers) > 1 or facts(func).random or not _by_row(_found(recorder), func, args, kwargs, result):
        refuse(recorder, f"{func} computes rows together that a mask selects")
    for item in tensors_in(result):
        _found(recorder).rows[id(item)] = item, min(numbers)


def answer(recorder: Recorder, mask: fx.Node, negated: bool) -> bool | None:
    """Whether a mask that `asked_mask` found selects anything: it does, unless it is taken to be empty."""
    if recorder.selections is None:
        return None
    number = recorder.selections.number(mask)
    recorder.selections.asked.add(number)
    if len(recorder.selections.asked) > _MASKS:
        refuse(recorder, f"asks of more than {_MASKS} masks whether they are empty")
    return (number not in recorder.selections.empty) != negated


def asked_mask(recorder: Recorder, value: TracedValue) -> tuple[fx.Node, bool] | None:
    """The mask of which a value, outside of blocks, says whether it selects anything, or (True) that it does not."""
    if recorder.frame.parent is not None or value.fake.dtype is not torch.bool or value.fake.numel() != 1:
        return None
    node, negated = recorder.node(value.fake), False
    while node.target in _NOT and isinstance(node.args[0], fx.Node):
        node, negated = node.args[0], not negated
    source = node.args[0] if node.target is aten.any.default else None
    if node.target in _CHECKS and node.args[1] == _CHECKS[node.target]:
        count, negated = node.args[0], negated != (node.target in (aten.eq.Scalar, aten.lt.Scalar))
        source = count.args[0] if isinstance(count, fx.Node) and count.target in _COUNTS else None
    if isinstance(source, fx.Node) and source.meta[SPEC].dtype is torch.bool:
        return source, negated
    return None


class Uncounted(int):
    """The number of selected rows: it may go on to a view of these, but nothing can be worked out from it."""

    recorder: Recorder

    def _refuse(self, *_: Any) -> NoReturn:
        refuse(self.recorder, "counts rows that a mask selects")


_ASKED = ("eq", "ne", "lt", "le", "gt", "ge", "bool", "float", "int", "index", "neg", "abs", "round")
_WORKED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "divmod")
for _name in (*_ASKED, *_WORKED, *(f"r{name}" for name in _WORKED)):
    setattr(Uncounted, f"__{_name}__", Uncounted._refuse)
_SIZES = (torch.Tensor.shape.__get__, torch.Tensor.size)  # type: ignore[attr-defined]
_COUNTED = (torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.__len__)
_VIEWS = (torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.expand)


def measured(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """How large selected rows are, to Python; None where that is not what it asks."""
    own = bool(recorder.selections is not None and args and recorder.selections.of(args[:1]))
    if own and func in _COUNTED:
        refuse(recorder, "counts rows that a mask selects")
    if own and func in _SIZES:
        count = Uncounted(args[0].shape[0])
        count.recorder = recorder
        sizes = torch.Size((count, *args[0].shape[1:]))
        dim = args[1] if len(args) > 1 and func is torch.Tensor.size else kwargs.get("dim")
        return sizes if dim is None else sizes[dim]
    if not (own and func in _VIEWS) and any(isinstance(x, Uncounted) for x in pytree.tree_leaves((args, kwargs))):
        refuse(recorder, "counts rows that a mask selects")
    return None


def refuse(recorder: Recorder, what: str) -> NoReturn:
    """Raise `Opaque`."""
    raise recorder.opaque(f"{source_line()}: {what}, and which these are depends on what cannot be known")


def _found(recorder: Recorder) -> Selections:
    assert recorder.selections is not None
    return recorder.selections


def _by_row(found: Selections, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether each row of the results, their first dim, is computed of the same row of selected operands."""
    packet = func.overloadpacket
    given = tensors_in((args, kwargs))
    ours = [tensor for tensor in given if id(tensor) in found.rows]
    others = [tensor for tensor in given if id(tensor) not in found.rows]
    rows = ours[0].shape[0]
    results = tensors_in(result)
    if not results or any(not item.dim() or item.shape[0] != rows for item in results):
        return False
    if torch.Tag.pointwise in func.tags or packet in _SAME:
        wide = results[0].dim()
        spread = all(item.dim() < wide or item.shape[0] == 1 for item in others)
        return spread and all(item.dim() == wide for item in ours)
    if packet is aten.linear:
        return _is_only(args[0], ours) and ours[0].dim() > 1
    if packet is aten.matmul:
        left, right = args[:2]
        batched = len(ours) == 2 and min(left.dim(), right.dim()) > 2
        return batched or (_is_only(left, ours) and left.dim() > 1 and right.dim() <= 2)
    if packet in _NORMS:
        return _is_only(args[0], ours) and len(argument(func, args, kwargs, "normalized_shape")) < ours[0].dim()
    if func in RESHAPES or packet in (aten.expand, aten.permute, aten.transpose):
        return _keeps_rows(func, packet, args)
    if packet in _BY_DIM and not others:
        return _is_apart(func, packet, args, kwargs, ours[0].dim())
    return False


def _is_only(tensor: torch.Tensor, ours: list[torch.Tensor]) -> bool:
    return len(ours) == 1 and ours[0] is tensor


def _keeps_rows(func: Any, packet: Any, args: Any) -> bool:
    dims = args[0].dim()
    if packet is aten.permute:
        return bool(args[1][0] % dims == 0)
    if packet is aten.transpose:
        return all(dim % dims for dim in args[1:3])
    return packet is not aten.expand or len(args[1]) == dims


def _is_apart(func: Any, packet: Any, args: Any, kwargs: Any, ndim: int) -> bool:
    """Whether what an operator does along dims is not along the first."""
    names = [arg.name for arg in func._schema.arguments if arg.name in ("dim", "dims", "axis")]
    dims = argument(func, tuple(args), kwargs, names[0]) if names else None
    if dims is None:
        return False
    more = packet in (aten.unsqueeze, aten.stack)
    every = [dims] if isinstance(dims, int) else list(dims)
    return bool(every) and all(dim % (ndim + more) for dim in every)

"""In-place operators made functional: a write gives a storage new contents, views follow on demand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from xdit_ir.capture.drawn import drawn_into
from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.known import fill, write_known
from xdit_ir.capture.operators import argument, aten, facts, functional_twin, left_out
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.selections import follow
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import TracedValue, View, spec_of
from xdit_ir.capture.views import scatter
from xdit_ir.errors import StateError, TraceError
from xdit_ir.ir.program import TensorSpec
from xdit_ir.reflection.fakes import device_of
from xdit_ir.reflection.tensors import tensors_in

# Operators that may write one value, and the position of that.
_FILLS = {
    aten.index_put_.default: 2,
    aten.masked_fill_.Scalar: 2,
    aten.masked_fill_.Tensor: 2,
    aten.fill_.Scalar: 1,
    aten.fill_.Tensor: 1,
    aten.copy_.default: 1,
}


def write(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Record an operator that writes to one of its arguments; returns that argument."""
    names = facts(func).writes
    target = argument(func, args, kwargs, names[0])
    if torch.Tag.inplace_view in func.tags:
        return _change_view(recorder, func, args, kwargs)
    twin = functional_twin(func)
    if twin is None or len(names) > 1:
        raise recorder.opaque(f"{source_line()}: {func} writes in place and has no functional form")
    value = recorder.value(target)
    if value.storage.owner and fill(recorder, func, args, kwargs, value):
        return target
    _check_writable(recorder, value)
    follow(recorder, twin, args, kwargs, target)
    kept = {key: item for key, item in kwargs.items() if key not in facts(func).out}
    node = _copied(recorder, args) if func is aten.copy_.default else _computed(recorder, func, args, kept, target)
    write_known(recorder, func, args, kwargs, value)
    roots = recorder.roots(tensors_in((args, kwargs)))
    _store(recorder, value, node, _filling(recorder, func, args))
    for member in value.storage.members:
        member.roots |= roots
    return target


def _check_writable(recorder: Recorder, value: TracedValue) -> None:
    if value.storage.owner:
        raise StateError(f"{source_line()}: forward writes to the model's own {value.storage.owner!r}")
    if value.frame is not recorder.frame or value.storage.shared:
        raise Unshareable("writes to a tensor that is shared with a block")


def _copied(recorder: Recorder, args: Any) -> fx.Node:
    """`copy_` as a conversion of its source."""
    target, source = args[0], args[1]
    node, spec = recorder.node(source), spec_of(source)
    if spec.dtype != target.dtype or device_of(source) != device_of(target):
        spec = TensorSpec(spec.shape, target.dtype)
        changes = {"dtype": target.dtype} if source.dtype != target.dtype else {}
        if device_of(source) != device_of(target):
            changes["device"] = device_of(target)
        node = recorder.call(aten._to_copy.default, (node,), changes, spec)
    if spec.shape != tuple(target.shape):
        node = recorder.call(aten.expand.default, (node, list(target.shape)), {}, spec_of(target))
    return node


def _computed(recorder: Recorder, func: Any, args: Any, kwargs: Any, target: torch.Tensor) -> fx.Node:
    twin, kwargs = functional_twin(func), {**left_out(func, args), **kwargs}
    result = recorder.fake(twin, args, kwargs)
    if result.shape != target.shape:
        raise TraceError(f"{source_line()}: {twin} gives another shape than the tensor that it is written to")
    args = drawn_into(recorder, func, tuple(args), result, target)
    node = recorder.call(twin, args, kwargs, spec_of(result))
    if result.dtype == target.dtype:
        return node
    return recorder.call(aten._to_copy.default, (node,), {"dtype": target.dtype}, spec_of(target))


def _filling(recorder: Recorder, func: Any, args: Any) -> bool | None:
    """The one flag that is written wherever anything is, if it is known."""
    if func not in _FILLS or args[0].dtype != torch.bool:
        return None
    given = args[_FILLS[func]]
    flag = recorder.value(given).known if isinstance(given, torch.Tensor) else torch.tensor(given)
    return bool(flag) if flag is not None and flag.numel() == 1 else None


def _folded(recorder: Recorder, view: View, written: fx.Node, filling: bool) -> fx.Node:
    """What `expand` was made of, after `filling` was written to some of the elements that share its memory."""
    shape, more = tuple(view.source.shape), view.result.dim() - view.source.dim()
    kept = (1,) * more + shape
    shared = [dim for dim, size in enumerate(kept) if dim < more or size != view.result.shape[dim]]
    func = aten.any.dims if filling else aten.all.dims
    if shared:
        written = recorder.call(func, (written, shared, True), {}, TensorSpec(kept, torch.bool))
    return recorder.call(aten.reshape.default, (written, list(shape)), {}, spec_of(view.source)) if more else written


def _store(recorder: Recorder, value: TracedValue, node: fx.Node, filling: bool | None = None) -> None:
    """Make `node` the contents of a tensor, and so of the storage that it is a view of; `filling`: see `_filling`."""
    storage = value.storage
    assert storage.node is not None
    bases = [storage.node]
    for view in value.chain[:-1]:
        bases.append(recorder.view_node(bases[-1], view))
    written: fx.Node | None = node
    folds = False
    for view, base in zip(reversed(value.chain), reversed(bases), strict=False):
        assert written is not None
        if view.func is aten.expand.default and filling is not None:
            written, folds = _folded(recorder, view, written, filling), True
            continue
        written = scatter(view, base, written, partial(_call, recorder, spec_of(view.source)))
        if written is None:
            raise TraceError(f"{source_line()}: cannot write through a view made by {view.func}")
    storage.node = written
    storage.version += 1
    if not folds:  # else more of it has changed than what was written to
        value.node, value.version = node, storage.version


def _call(recorder: Recorder, spec: TensorSpec, func: Any, *args: Any) -> fx.Node:
    return recorder.call(func, args, {}, spec)


def _change_view(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """In-place operators that only change the shape: `unsqueeze_`, `t_`, ..."""
    target = args[0]
    twin = functional_twin(func)
    if func is aten.detach_.default:
        return target
    if twin is None or not facts(twin).aliases:
        raise TraceError(f"{source_line()}: {func} changes a tensor's shape in place in a way that is not supported")
    value, before = recorder.value(target), recorder.blank(target)
    node = recorder.node(target)
    _check_writable(recorder, value)
    recorder.fake(func, args, kwargs)
    view = View(twin, (before, *args[1:]), kwargs, None, recorder.blank(target))
    value.node = recorder.view_node(node, view)
    value.chain = (*value.chain, view)
    if value.known is not None:
        value.known = twin(value.known, *args[1:], **kwargs)
    return target

"""The tracer: writes down, in functional form, every ATen operator that runs on fake tensors.

In inference mode composite operators (linear, layer_norm, scaled_dot_product_attention, ...) reach a dispatch
mode whole. Those that may return views (chunk, to, flatten, ...) are decomposed; the others stay whole.
All reshapes become `aten.reshape`, which unlike `aten.view` does not depend on strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from xdit_ir.capture.drawn import placed
from xdit_ir.capture.flex import attend, is_flex
from xdit_ir.capture.kernels import KERNELS, attend_by
from xdit_ir.capture.known import compute, read, resolve, separate
from xdit_ir.capture.loops import written_out
from xdit_ir.capture.operators import (
    COMPARES,
    DEVICE,
    IDENTITY,
    MAYBE_WHOLE,
    OWN,
    READS,
    RESHAPES,
    aten,
    drops_elements,
    facts,
)
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.selections import PUTS, follow, is_selecting, put
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import NO_ROOTS, Origin, TracedValue, View, spec_of
from xdit_ir.capture.writes import write
from xdit_ir.errors import TraceError
from xdit_ir.reflection.fakes import device_of
from xdit_ir.reflection.tensors import map_tensors, share_memory, tensors_in


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that run while it is active."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE:
            return device_of(args[0])
        if not self.recorder.active:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator) and is_flex(func):
            return self._again(attend, self.recorder, *args, **kwargs)
        if isinstance(func, HigherOrderOperator) and (loop := written_out(func)) is not None:
            return self._again(loop, self.recorder, *args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            raise self.recorder.opaque(f"{source_line()}: the higher-order operator {func} cannot be captured")
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # what it does with its parts comes here next
        with self.recorder.recording(False):
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in READS:
            return func(*map_tensors(args, lambda tensor: read(self.recorder, tensor, _name(func))), **kwargs)
        self._check(func, args, kwargs)
        if func in COMPARES:
            return self._again(_compared, func, *args, **kwargs)
        if func in KERNELS:
            return self._again(attend_by, func, tuple(args), kwargs)
        if func is aten._to_copy.default and not isinstance(args[0], torch.Tensor):  # vmap's form of a number
            func, kwargs = aten.scalar_tensor.default, {"dtype": kwargs.get("dtype")}
        args, kwargs = map_tensors((tuple(args), kwargs), lambda tensor: self.recorder.value(tensor).fake)
        if self.recorder.selections is not None and func in PUTS and is_selecting(self.recorder, func, args):
            return put(self.recorder, func, args, kwargs, self._again)
        about = facts(func)
        opened = about.writes or about.aliases or func.namespace not in OWN
        if about.composite and opened and func not in RESHAPES:
            return self._again(func.decompose, *args, **kwargs)
        return write(self.recorder, func, args, kwargs) if about.writes else self._record(func, args, kwargs)

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        if drops_elements(func, args, kwargs):
            raise TraceError(f"{source_line()}: dropout is active; call .eval() on the model before tracing it")

    def _again(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with self, self.recorder.recording(True):
            return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        about = facts(func)
        may_view = about.composite and not about.aliases and len(tensors_in((args, kwargs))) == 1
        try:
            result = (self.recorder.fake_uncached if may_view else self.recorder.fake)(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return resolve(self.recorder, func, args, kwargs, self._again)
        tensors = tensors_in(result)
        if not tensors:
            return result
        if isinstance(result, tuple) and any(item is None for item in result):
            raise TraceError(f"{source_line()}: {func} returns None among its results, which no program has")
        follow(self.recorder, func, args, kwargs, result)
        shares = not about.aliases and about.composite and share_memory(result, (args, kwargs))
        if shares and func not in RESHAPES:
            return self._again(func.decompose, *args, **kwargs)
        known = compute(self.recorder, func, args, kwargs, result)
        if func in RESHAPES:
            func, args, kwargs = aten.reshape.default, (args[0], list(result.shape)), {}
            shares = share_memory(result, args)
        if (about.aliases and (shares or func not in RESHAPES)) or func in IDENTITY:
            return self._views(func, args, kwargs, result, known)
        return self._fresh(func, args, kwargs, result, separate(known, args))

    def _fresh(self, func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
        recorder = self.recorder
        about = facts(func)
        roots = NO_ROOTS if about.shape_only else recorder.roots(tensors_in((args, kwargs)))
        if about.random:
            roots |= {Origin.RANDOM}
            args = placed(recorder, func, args, result)
        node = recorder.call(func, args, kwargs, spec_of(result))
        if isinstance(result, torch.Tensor):
            recorder.bind(result, node, known, roots)
            return result
        for index, item in enumerate(result):
            part = recorder.item(node, index, spec_of(item))
            recorder.bind(item, part, known[index] if known is not None else None, roots)
        return result

    def _views(self, func: Any, args: Any, kwargs: Any, result: Any, known: Any) -> Any:
        if isinstance(result, torch.Tensor):
            if func in MAYBE_WHOLE and result.shape == args[0].shape:
                func, args, kwargs = aten.alias.default, args[:1], {}
            self._view(View(func, args, kwargs, None, result), known, None)
            return result
        pieces = spec_of(result)
        node = self.recorder.call(func, args, kwargs, pieces)
        for index, item in enumerate(result):
            view = View(func, args, kwargs, index, item, pieces)
            part = self.recorder.item(node, index, pieces[index])
            self._view(view, known[index] if known is not None else None, part)
        return result

    def _view(self, view: View, known: torch.Tensor | None, node: Any) -> None:
        recorder = self.recorder
        source = recorder.value(view.source)
        node = node or recorder.view_node(recorder.node(view.source), view)
        frame, storage = recorder.frame, source.storage
        if source.frame is None or view.result is view.source:
            return self._view_of_state(view, source, node, known)
        chain = (*source.chain, view)
        recorder.add(TracedValue(view.result, frame, storage, chain, node, storage.version, known, source.roots))
        return None

    def _view_of_state(self, view: View, source: TracedValue, node: Any, known: torch.Tensor | None) -> None:
        if view.result is not view.source:
            value = self.recorder.bind(view.result, node, known, source.roots)
            value.storage.owner = source.storage.owner


def _compared(func: Any, left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """`equal` and `allclose` element by element, so that what Python reads is one number."""
    if func is aten.equal.default:
        return left.shape == right.shape and bool((left == right).all())
    return bool(torch.isclose(left, right, *args, **kwargs).all())


def _name(func: Any) -> str:
    return f"{func._schema.name.rpartition('::')[2].strip('_')}()"

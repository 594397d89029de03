"""How Python code of the model gets at contents, past operators: `numpy()`, `tolist()`, `torch.tensor(...)`."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from xdit_ir.capture.dressed import as_class
from xdit_ir.capture.known import read
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.selections import measured
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import Origin, expand
from xdit_ir.errors import TraceError
from xdit_ir.ir.wrappers import is_wrapper, parts_inside
from xdit_ir.reflection.fakes import is_fake
from xdit_ir.reflection.looked_into import is_library
from xdit_ir.reflection.tensors import map_tensors, tensors_in

_ACCELERATORS = ("cuda", "xpu")


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of the trace, or wraps one in a transform of `torch.func`, below which it is seen."""
    if is_fake(tensor) or is_functorch_wrapped_tensor(tensor):
        return True
    return is_wrapper(tensor) and all(_is_traced(part) for _, part in parts_inside("", tensor))


def check_lent(recorder: Recorder) -> None:
    """Raise `TraceError` if forward wrote to the memory of a tensor through NumPy, where no operator tells."""
    for array, before, tensor, users in recorder.lent:
        written = array.tobytes() != before.tobytes()
        if written and (users is None or len(recorder.value(tensor).node.users) > users):  # type: ignore[union-attr]
            name = recorder.value(tensor).storage.owner or "a tensor"
            raise TraceError(f"forward writes to {name} through NumPy, which a program does not; write with torch")


class PythonReads(TorchFunctionMode):
    """Catches `numpy()`, `tolist()` and `torch.tensor(...)` in the model's code."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        texts = (torch.Tensor.__repr__, torch.Tensor.__format__)
        reads = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, *texts)
        makers = (torch.tensor, torch.as_tensor, torch.asarray)
        layouts = (torch.Tensor.stride, torch.Tensor.is_contiguous)
        self._handlers = {**dict.fromkeys(reads, self._read), **dict.fromkeys(makers, self._make)}
        self._handlers |= dict.fromkeys(layouts, self._note_layout)
        self._handlers[torch.Tensor.as_subclass] = self._as_class
        self._handlers |= dict.fromkeys((torch.Tensor.storage_offset, torch.Tensor.data_ptr), self._refuse_offset)
        self._handlers[torch.Tensor.new_tensor] = self._make_like
        self._handlers[torch._nested_tensor_from_mask_left_aligned] = self._packs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._recorder.active:
            return func(*args, **kwargs)
        if self._recorder.hollow and any(torch.is_autocast_enabled(kind) for kind in _ACCELERATORS):
            raise TraceError(f"{source_line()}: autocast on a device other than the model's; move it there")
        if any(not _is_traced(tensor) for tensor in tensors_in((args, kwargs))):
            args, kwargs = map_tensors((args, kwargs), self._to_fake)
        foreign = isinstance(func, FunctionType) and not is_library(func.__module__)
        if foreign and func in vars(torch.Tensor).values():
            raise TraceError(
                f"{source_line()}: a method of torch.Tensor was replaced by {func.__qualname__}, which a trace "
                "would call twice; replace the function that calls it"
            )
        if self._recorder.selections is not None and self._recorder.selections.rows:
            with self._recorder.recording(False):
                size = measured(self._recorder, func, args, kwargs)
            if size is not None:
                return size
        handler = self._handlers.get(func) if not (args and is_wrapper(args[0])) else None
        return func(*args, **kwargs) if handler is None else handler(func, args, kwargs)

    def _to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Real tensors become constants here: views of them do not pass through a dispatch mode."""
        if _is_traced(tensor):
            return tensor
        with self._recorder.recording(False):
            return self._recorder.value(tensor).fake

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._recorder
        with recorder.recording(False):
            result = func(read(recorder, args[0], f"{func.__name__}()").clone(), *args[1:], **kwargs)
            if isinstance(result, np.ndarray):
                value = recorder.value(args[0])
                given = (argument.storage for argument in recorder.frame.arguments)
                own = bool(value.storage.owner) or any(value.storage is storage for storage in given)
                users = [] if own else list(recorder.node(args[0]).users)
                recorder.lent.append((result, result.copy(), args[0], None if own else len(users)))
        return result

    def _note_layout(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._recorder.frame.strides = True
        with self._recorder.recording(False):
            if any(root is not Origin.CONSTANT for root in expand(self._recorder.value(args[0]).roots)):
                self._recorder.read_layouts = f"{source_line()} ({func.__name__})"
            return func(*args, **kwargs)

    def _as_class(self, func: Any, args: Any, kwargs: Any) -> Any:
        traced = is_fake(args[0])
        return as_class(self._recorder, *args, **kwargs) if traced else func(*args, **kwargs)

    def _refuse_offset(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise TraceError(f"{source_line()}: {func.__name__}() is of the caller's memory, and not traced")

    def _packs(self, func: Any, args: Any, kwargs: Any) -> bool:
        """PyTorch's own encoder packs padded samples, which leaves zeros at padding, but under no mode such as this."""
        with self._recorder.recording(False):
            kept = read(self._recorder, args[1], "packing by a mask")
            packs = bool(func(torch.zeros(*kept.shape, 1), kept))
        if packs and not kept.all():
            raise self._recorder.opaque(f"{source_line()}: packs samples without their padding into a nested tensor")
        return packs

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
        if isinstance(data, torch.Tensor) or data is None:
            return func(*args, **kwargs)
        data = map_tensors(data, self._scalar)
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        rest = {key: item for key, item in kwargs.items() if key not in ("data", "obj", "device")}
        with self._recorder.recording(False):
            made = func(data, *args[1:], **rest, device="cpu")
            return self._recorder.constant(made, device=device).fake

    def _make_like(self, func: Any, args: Any, kwargs: Any) -> Any:
        defaults = {"dtype": args[0].dtype, "device": args[0].device}
        return self._make(torch.tensor, args[1:], {**defaults, **kwargs})

    def _scalar(self, tensor: torch.Tensor) -> Any:
        with self._recorder.recording(False):
            return read(self._recorder, tensor, "torch.tensor()").tolist()

"""Partial evaluation: contents that follow from sizes, integer inputs, masks and buffers are known.

They are carried beside the fake tensors. When Python, a shape or an index reads them, the inputs behind them
become guards. Reading anything else is an error that names the source line and what the value depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from xdit_ir.capture.assertions import only_answer
from xdit_ir.capture.dressed import as_class
from xdit_ir.capture.failures import Unshareable
from xdit_ir.capture.fakes import device_of, is_fake
from xdit_ir.capture.looked_into import is_library
from xdit_ir.capture.operators import aten, facts
from xdit_ir.capture.predicates import made_of_state, of_state, predicate, weighed
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.selections import answer as answer_of
from xdit_ir.capture.selections import asked_mask, is_selecting, measured, select
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import (
    KNOWN_INPUT_NUMEL,
    KNOWN_NUMEL,
    FromArgument,
    FromBuffer,
    Origin,
    Roots,
    TracedValue,
    expand,
    map_tensors,
    share_memory,
    spec_of,
    storage_id,
    tensors_in,
)
from xdit_ir.errors import TraceError
from xdit_ir.ir.wrappers import is_wrapper, parts_inside

_ACCELERATORS = ("cuda", "xpu")
_TABLE = 2
MASK = "a boolean index"


def readable(tensor: torch.Tensor) -> bool:
    """Whether an input's contents may be read: integers, masks, floating-point tables of whole numbers."""
    if tensor.device.type == "meta" or tensor.numel() > KNOWN_INPUT_NUMEL or tensor.dtype.is_complex:
        return False
    if not tensor.dtype.is_floating_point:
        return True
    if tensor.dim() < _TABLE or tensor.numel() > KNOWN_NUMEL or not tensor.numel():
        return False
    return bool((tensor == tensor.round()).all())


def says_what_is_there(tensor: torch.Tensor) -> bool:
    """Whether an input is of integers, or a floating-point mask of what counts, and may be read: ones and zeros, or
    numbers so low that nothing is left of a score that they are added to."""
    if not readable(tensor):
        return False
    lowest = torch.finfo(torch.float32).min / 2
    return not tensor.is_floating_point() or bool(((tensor == 0) | (tensor == 1) | (tensor < lowest)).all())


def _ready(recorder: Recorder, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    values = [recorder.value(tensor) for tensor in tensors_in((args, kwargs))]
    if any(value.known is None for value in values):
        return None
    args, kwargs = map_tensors((args, kwargs), lambda tensor: recorder.value(tensor).known)
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    return args, kwargs


def _ready_of_state(recorder: Recorder, args: Any, kwargs: Any, owner: str) -> tuple[Any, Any] | None:
    """As `_ready`, for what depends on no input; where it is made of weights, these are asked as they are now."""
    tensors = tensors_in((args, kwargs))
    if not of_state(frozenset(expand(recorder.roots(tensors)))):
        return None
    ready = _ready(recorder, args, kwargs)
    if ready is not None:
        return ready
    if recorder.frame.parent is not None:
        raise Unshareable(f"fills {owner!r} with what is made of weights")
    values = [recorder.value(tensor) for tensor in tensors]
    known = {id(value.fake): made_of_state(recorder, value) if value.known is None else value.known for value in values}
    if any(contents is None for contents in known.values()):
        return None
    return map_tensors((args, kwargs), lambda tensor: known[id(recorder.value(tensor).fake)])  # type: ignore[no-any-return]


def compute(recorder: Recorder, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """The contents of an operator's result, if they follow from known contents and are small enough."""
    if facts(func).random or any(item.numel() > KNOWN_NUMEL for item in tensors_in(result)):
        return None
    if facts(func).shape_only:
        args = map_tensors(args, lambda tensor: torch.empty(_like(func, tensor), dtype=tensor.dtype))
        kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)
    ready = _ready(recorder, args, kwargs)
    if ready is None:
        return None
    try:
        known = func(*ready[0], **ready[1])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return known if spec_of(known) == spec_of(result) else None


def _like(func: Any, tensor: torch.Tensor) -> tuple[int, ...]:
    return (0,) if _name(func).startswith("new") else tuple(tensor.shape)


def separate(known: Any, args: Any) -> Any:
    """Contents of a result that is no view, copied if they share memory with those of the arguments."""
    return map_tensors(known, torch.Tensor.clone) if known is not None and share_memory(known, args) else known


def write_known(recorder: Recorder, func: Any, args: Any, kwargs: Any, target: TracedValue) -> None:
    """Do an in-place operator on the known contents too; contents that do not follow it are forgotten."""
    ready = _ready(recorder, args, kwargs)
    if ready is None or facts(func).random or target.known is None:
        forget(target)
        return
    func(*ready[0], **ready[1])
    for member in target.storage.members:
        if member.known is not None and storage_id(member.known) != storage_id(target.known):
            member.known = None


def fill(recorder: Recorder, func: Any, args: Any, kwargs: Any, target: TracedValue) -> bool:
    """Do an in-place operator on a table of the model's own, if it depends on no input.

    What a write leaves as it is was none; what it changes is noted, so that the model is traced again with that.
    """
    owner = target.storage.owner
    base, real = recorder.tables.get(owner, (None, None))
    if base is None or real is None or base.known is None or facts(func).random:
        return False
    if target.known is None or storage_id(target.known) != storage_id(base.known):
        return False
    ready = _ready_of_state(recorder, args, kwargs, owner)
    if ready is None:
        return False
    before = base.known.clone()
    func(*ready[0], **ready[1])
    if torch.equal(base.known, before):
        return True
    if recorder.frame.parent is not None:
        base.known.copy_(before)
        raise Unshareable(f"fills {owner!r}")
    recorder.filled[owner] = real
    return True


def forget(target: TracedValue) -> None:
    """Forget the contents of a tensor and of all that share its storage."""
    for member in target.storage.members:
        member.known = None


def read(recorder: Recorder, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The contents of a tensor that Python, a shape or an index wants to see."""
    value = recorder.value(tensor)
    if value.known is None:
        asks, only = asked_mask(recorder, value), None
        if value.fake.numel() == 1:
            only = only_answer(recorder.entry)
        selects = None if asks is None or only is not None else answer_of(recorder, *asks)
        if selects is not None:
            return torch.full(value.fake.shape, selects)
        fact = predicate(recorder, value, what)
        if fact is not None:
            recorder.predicates.append(fact)
            return fact.value.clone()
        held = weighed(recorder, value, what)
        if held is not None:
            return held
        if only is not None:
            return torch.full(value.fake.shape, only, dtype=value.fake.dtype)
        raise _unknown(recorder, value.roots, what, selects=asks is not None or what == MASK)
    note_read(recorder, value.roots, what)
    return value.known


def note_read(recorder: Recorder, roots: Roots, what: str) -> None:
    """Record that contents were seen: as guards on inputs, or as a dependence of a block on an argument."""
    if recorder.frame.parent is not None and any(isinstance(root, FromBuffer) for root in roots):
        raise Unshareable("reads the contents of a buffer")
    for root in roots:
        if isinstance(root, FromArgument):
            root.frame.reads.add(root.index)
    for origin in expand(roots):
        if isinstance(origin, str):
            recorder.read_inputs.setdefault(origin, f"{source_line()} ({what})")
        elif isinstance(origin, FromBuffer):
            recorder.read_buffers.setdefault(origin.name, f"{source_line()} ({what})")


def _unknown(recorder: Recorder, roots: Roots, what: str, *, selects: bool = False) -> TraceError:
    origins = sorted(expand(roots), key=str)
    blamed = [root for root in origins if root in (Origin.PARAMETER, Origin.RANDOM)]
    inputs = [root for root in origins if isinstance(root, str)]
    hollow = [name for name in inputs if not recorder.inputs[name].dtype.is_floating_point]
    text = f"{source_line()}: {what} needs the contents of a tensor that depends on "
    if hollow and not blamed and len(hollow) == len(inputs):
        return TraceError(
            f"{text}input{_s(hollow)} {_list(hollow)}, which cannot be known while tracing; "
            "pass a small real tensor (on the CPU) instead of one on the meta device"
        )
    names = [f"input {name!r}" for name in inputs] + [root.value for root in blamed]
    blame = ", ".join(names) or Origin.BUFFER.value
    return recorder.opaque(f"{text}{blame}; only contents of integer inputs and masks may be read", selects=selects)


def _s(names: list[str]) -> str:
    return "" if len(names) == 1 else "s"


def _list(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def resolve(recorder: Recorder, func: Any, args: Any, kwargs: Any, record: Callable[..., Any]) -> Any:
    """The result of an operator whose shape depends on contents: constants, or indexing by constants.

    `record(func, *args)` runs and records an operator.
    """
    device = next((device_of(tensor) for tensor in tensors_in(args)), recorder.device)

    def held(real: torch.Tensor, name: str) -> torch.Tensor:
        return recorder.constant(real.clone(), name, device).fake

    if recorder.selections is not None and is_selecting(recorder, func, args):
        return select(recorder, args, record)
    if func is aten.index.Tensor:
        places = [place for index in args[1] for place in _places(recorder, index, held)]
        return record(func, args[0], places)
    if func is aten.masked_select.default:
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        whole, mask = (record(aten.expand.default, item, shape) for item in args[:2])
        return record(aten.index.Tensor, whole, [mask])
    if facts(func).composite:
        return record(func.decompose, *args, **kwargs)
    ready = map_tensors((args, kwargs), lambda tensor: read(recorder, tensor, _name(func)))
    if ready[1].get("device") is not None:
        ready[1]["device"] = torch.device("cpu")
    return map_tensors(func(*ready[0], **ready[1]), lambda tensor: held(tensor, _name(func)))


def _places(
    recorder: Recorder, index: torch.Tensor | None, held: Callable[[torch.Tensor, str], torch.Tensor]
) -> list[torch.Tensor | None]:
    """An index as it is; a mask as the places that it selects, one index for each of its dimensions."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [held(place, "places") for place in read(recorder, index, MASK).nonzero().unbind(1)]


def _name(func: Any) -> str:
    return str(func._schema.name.rpartition("::")[2].strip("_"))


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

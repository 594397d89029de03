"""Tensors that stand for a result that is not finished yet: what is done to them is noted, and done part by part.

A scheduler's step applies nothing but pointwise operators, joins and splits of samples, and changes of shape, so the
next latents of a patch can be had as soon as the model's output for that patch is there. An operator on a `Deferred`
is recorded; `pull` computes a range of one dimension of the result, from that range of what it was made of;
everything else (reading a value, an operator that mixes positions) computes the whole, which costs time and is right.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from xdit_ir.errors import MismatchError
from xdit_ir.runtime.separable import Needs, Range, is_recordable, operand_ranges, resized, tensors_in

aten = torch.ops.aten
SMALL = 4096  # bytes of a concrete operand that is copied when it is recorded, since schedulers reuse such


class Source(Protocol):
    """Where the parts of a pending result come from."""

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """A range of one dimension; may wait."""
        ...

    def whole(self) -> torch.Tensor:
        """All of it; may wait."""
        ...


@dataclass(frozen=True)
class Descent:
    """From which pending result of one maker a value was made: the newest one, by number; `dims[d]` is the dimension
    of it whose positions dimension `d` follows, if any."""

    number: int
    dims: tuple[int | None, ...]


Lineage = Mapping[Any, Descent]
"""By maker of pending results."""


@dataclass(eq=False)
class Value:
    """A node of what was recorded: `func(*args, **kwargs)[index]`, a pending result, or a finished tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: Source | None = None
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None
    done: torch.Tensor | None = None
    parts: dict[Range, torch.Tensor] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=dict)

    def pull(self, wanted: Range) -> torch.Tensor | None:
        """This range of it, or None where it does not follow from the same range of what it was made of."""
        if self.done is not None:
            return self.done.narrow(wanted.dim, wanted.start, wanted.size)
        if wanted not in self.parts:
            part = self._computed(wanted)
            if part is None:
                return None
            self.parts[wanted] = part
            self._settle(wanted.dim)
        if self.done is not None:
            return self.done.narrow(wanted.dim, wanted.start, wanted.size)
        return self.parts[wanted]

    def is_separable(self, wanted: Range) -> bool:
        """Whether `pull` would succeed, without computing anything."""
        if self.done is not None or wanted in self.parts or self.source is not None:
            return True
        needs = self._needs(wanted)
        return needs is not None and all(
            value.is_separable(part)
            for value, part in zip(self._operands(), needs, strict=True)
            if isinstance(value, Value) and part is not None
        )

    def whole(self) -> torch.Tensor:
        """All of it."""
        if self.done is None:
            if self.source is not None:
                self._finish(self.source.whole())
            else:
                args, kwargs = pytree.tree_map(_whole, (self.args, self.kwargs))
                self._finish(self._pick(_replayed(self.func)(*args, **kwargs)))
        assert self.done is not None
        return self.done

    def _operands(self) -> list[Value | Kept]:
        return tensors_in((self.args, self.kwargs), (Value, Kept))

    def _needs(self, wanted: Range) -> list[Range | None] | None:
        shapes = [operand.shape for operand in self._operands()]
        return operand_ranges(self.func, self.args, shapes, self.shape, wanted)

    def _computed(self, wanted: Range) -> torch.Tensor | None:
        if self.source is not None:
            return self.source.part(wanted.dim, wanted.start, wanted.stop)
        needs = self._needs(wanted)
        if needs is None:
            return None
        pulled = []
        for operand, part in zip(self._operands(), needs, strict=True):
            piece = _whole(operand) if part is None else operand.pull(part)
            if piece is None:
                return None
            pulled.append(piece)
        supply = iter(pulled)
        args, kwargs = pytree.tree_map_only((Value, Kept), lambda _: next(supply), (self.args, self.kwargs))
        return self._pick(_replayed(self.func)(*resized(self.func, args, self.shape, wanted), **kwargs))

    def _pick(self, result: Any) -> torch.Tensor:
        picked: torch.Tensor = result if self.index is None else result[self.index]
        return picked

    def _settle(self, dim: int) -> None:
        """Once the parts cover everything, forget how they were made: a loop must not keep its whole history."""
        parts = sorted((part for part in self.parts if part.dim == dim), key=lambda part: part.start)
        ends = [0, *(part.stop for part in parts)]
        if [part.start for part in parts] == ends[:-1] and ends[-1] == self.shape[dim]:
            self._finish(torch.cat([self.parts[part] for part in parts], dim))

    def descend(self) -> Value:
        """Note of which pending results this was made."""
        operands = [operand for operand in self._operands() if isinstance(operand, Value) and operand.lineage]
        makers = dict.fromkeys(maker for operand in operands for maker in operand.lineage)
        if makers:
            needs = [self._needs(Range(dim, 0, size)) for dim, size in enumerate(self.shape)]
            self.lineage = {maker: self._descent(maker, needs) for maker in makers}
        return self

    def _descent(self, maker: Any, needs: Sequence[Needs | None]) -> Descent:
        newest = max(v.lineage[maker].number for v in self._operands() if isinstance(v, Value) and maker in v.lineage)
        dims: list[int | None] = []
        for needed in needs:
            followed = set()
            for operand, part in zip(self._operands(), needed or (), strict=False):
                source = operand.lineage.get(maker) if isinstance(operand, Value) else None
                if source is not None and source.number == newest:
                    followed.add(None if part is None else source.dims[part.dim])
            dims.append(followed.pop() if len(followed) == 1 else None)
        return Descent(newest, tuple(dims))

    def _finish(self, value: torch.Tensor) -> None:
        self.done, self.source, self.func = value, None, None
        self.args, self.kwargs, self.parts = (), {}, {}


@dataclass(eq=False)
class Kept:
    """A concrete operand as it was when it was recorded."""

    tensor: torch.Tensor
    version: int

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.tensor.shape

    def pull(self, wanted: Range) -> torch.Tensor:
        """A range of it."""
        return self.get().narrow(wanted.dim, wanted.start, wanted.size)

    @staticmethod
    def of(tensor: torch.Tensor) -> Kept:
        """Small ones are copied; of others it is checked later that nobody wrote to them."""
        if tensor.nbytes <= SMALL:
            return Kept(tensor.clone(), 0)
        return Kept(tensor, 0 if tensor.is_inference() else tensor._version)

    def get(self) -> torch.Tensor:
        """The operand; raises `MismatchError` if it was overwritten since."""
        if self.tensor.nbytes > SMALL and not self.tensor.is_inference() and self.tensor._version != self.version:
            raise MismatchError(
                f"a tensor of shape {list(self.tensor.shape)} was written to after it had been combined with a result "
                "that is still being computed; use an operator out of place, or read the result first"
            )
        return self.tensor


def _replayed(func: Any) -> Any:
    """A view of memory that is laid out otherwise than it was when recorded may have to copy."""
    return aten.reshape.default if func in (aten.view.default, aten._unsafe_view.default) else func


def _whole(leaf: Any) -> Any:
    return leaf.whole() if isinstance(leaf, Value) else leaf.get() if isinstance(leaf, Kept) else leaf


class Deferred(torch.Tensor):
    """A tensor whose contents are a `Value`; has its shape, dtype and device, and behaves like any other."""

    value: Value
    views: list[weakref.ref[Deferred]]
    origin: tuple[Deferred, Any, Any, Any, int | None] | None

    @staticmethod
    def __new__(cls, value: Value) -> Deferred:
        with torch.inference_mode(False):  # views of what was made outside must be as that is
            made: Deferred = torch.Tensor._make_wrapper_subclass(
                cls, value.shape, strides=value.stride, dtype=value.dtype, device=value.device, requires_grad=False
            )
        made.value, made.views, made.origin = value, [], None
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return force(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return force(self).clone()

    def numpy(self, *, force: bool = False) -> Any:
        """As `Tensor.numpy`, of the whole value."""
        return _read(self).numpy(force=force)

    def tolist(self) -> Any:
        """As `Tensor.tolist`, of the whole value."""
        return _read(self).tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and all(isinstance(leaf, torch.Tensor) for leaf in args[1:]):
            return _noted(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _record(func, args, kwargs or {})


def pending(
    source: Source,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    maker: Any = None,
    number: int = 0,
) -> Deferred:
    """A tensor for what `source` will give; the result with this `number` of a `maker`, which is noted in what is made
    of it."""
    like = torch.empty(tuple(shape), device="meta")
    lineage = {} if maker is None else {maker: Descent(number, tuple(range(len(like.shape))))}
    return Deferred(Value(like.shape, like.stride(), dtype, device, source=source, lineage=lineage))


def is_separable(tensor: torch.Tensor, dim: int, start: int, stop: int) -> bool:
    """Whether `pull` would compute no more than this range."""
    return not isinstance(tensor, Deferred) or tensor.value.is_separable(Range(dim, start, stop))


def pull(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """A range of one dimension, from as little of what it was made of as possible."""
    if not isinstance(tensor, Deferred):
        return tensor.narrow(dim, start, stop - start)
    with _clean():
        part = tensor.value.pull(Range(dim, start, stop))
        return tensor.value.whole().narrow(dim, start, stop - start) if part is None else part


def force(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor; waits for all of it."""
    if not isinstance(tensor, Deferred):
        return tensor
    with _clean():
        return tensor.value.whole()


@contextlib.contextmanager
def _clean() -> Iterator[None]:
    """Whatever mode the reader is in: casts and gradients were dealt with when operators were recorded."""
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def _record(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _needs_shapes_only(func):
        args, kwargs = pytree.tree_map_only(Deferred, _like, (args, kwargs))
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return _in_place(func, args, kwargs)
    if is_recordable(func):
        return _noted(func, args, kwargs)
    if func._can_decompose():  # in inference mode, what is made of other operators arrives here as it is
        return func.decompose(*args, **kwargs)
    return _eager(func, args, kwargs)


def _needs_shapes_only(func: Any) -> bool:
    name = func._schema.name.partition("::")[2]
    return bool(name.endswith("_like") or name.startswith("new_"))


def _like(tensor: Deferred) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _eager(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(Deferred, force, (args, kwargs))
    return func(*args, **kwargs)


def _noted(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator's results, as tensors that stand for them."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != _device(args).type:
        return _eager(func, args, kwargs)
    try:
        metas = _metas(func, args, kwargs)
    except Exception:  # what fails on shapes fails on values too, with the operator's own message
        return _eager(func, args, kwargs)
    frozen_args, frozen_kwargs = pytree.tree_map_only(torch.Tensor, _frozen, (tuple(args), kwargs))

    def made(meta: torch.Tensor, index: int | None) -> Deferred:
        value = Value(meta.shape, meta.stride(), meta.dtype, meta.device, None, func, frozen_args, frozen_kwargs, index)
        return _viewed(Deferred(value.descend()), func, args, kwargs, index)

    if isinstance(metas, torch.Tensor):
        return made(metas, None)
    return type(metas)(made(meta, index) for index, meta in enumerate(metas))


def _viewed(result: Deferred, func: Any, args: Any, kwargs: Any, index: int | None) -> Deferred:
    """Remember whose memory a result shares: a write to one is a write to both."""
    schema = getattr(func, "_schema", None)
    if schema is not None and any(one.alias_info is not None for one in schema.returns):
        result.origin = (args[0], func, args[1:], kwargs, index)
        args[0].views.append(weakref.ref(result))
    return result


def _metas(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:

        def fake(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, fake, (tuple(args), kwargs))
        return func(*fake_args, **fake_kwargs)


def _device(args: Any) -> torch.device:
    return next(leaf.device for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor))


def _frozen(tensor: torch.Tensor) -> Value | Kept:
    return tensor.value if isinstance(tensor, Deferred) else Kept.of(tensor)


def _in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A write to a deferred tensor that shares memory with none makes it stand for the result."""
    target = args[0]
    name = func._schema.name.partition("::")[2]
    functional = getattr(getattr(aten, name[:-1], None), func._overloadname, None) if name.endswith("_") else None
    if not isinstance(target, Deferred):
        return _eager(func, args, kwargs)
    if target.origin is not None or _living(target) or functional is None or not is_recordable(functional):
        return _written(func, args, kwargs)
    value = _value(_noted(functional, args, kwargs))
    if value.dtype != target.dtype:
        value = _value(_noted(aten._to_copy.default, (Deferred(value),), {"dtype": target.dtype}))
    target.value = value
    return target


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give a family of views plain memory of its own, and write to that."""
    target = root = args[0]
    while root.origin is not None:
        root = root.origin[0]
    _settle_family(root, force(root).clone())
    plain_args, plain_kwargs = pytree.tree_map_only(Deferred, force, (tuple(args), kwargs))
    func(*plain_args, **plain_kwargs)
    return target


def _settle_family(member: Deferred, plain: torch.Tensor) -> None:
    member.value = _value(plain)
    for view in _living(member):
        assert view.origin is not None
        _, func, rest, kwargs, index = view.origin
        result = func(plain, *rest, **kwargs)
        _settle_family(view, result if index is None else result[index])


def _living(member: Deferred) -> list[Deferred]:
    return [view for view in (ref() for ref in member.views) if view is not None]


def _value(tensor: torch.Tensor) -> Value:
    if isinstance(tensor, Deferred):
        return tensor.value
    return Value(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, done=tensor)


_read = force

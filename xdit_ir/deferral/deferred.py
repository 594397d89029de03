"""Tensors that stand for a result that is not finished yet: what is done to them is noted, and done part by part.

A scheduler's step applies nothing but pointwise operators, joins and splits of samples, and changes of shape, so the
next latents of a patch can be had as soon as the model's output for that patch is there. An operator on a `Deferred`
is recorded; `materialize_slice` computes a range of one dimension of the result, from that range of what it was made
of; everything else (reading a value, an operator that mixes positions) computes the whole, which costs time and is
right.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from xdit_ir.deferral.descent import Descent, Numbered
from xdit_ir.deferral.recorded import Kept, RecordedValue, Source
from xdit_ir.deferral.samples import Samples
from xdit_ir.deferral.separable import Range, is_recordable
from xdit_ir.emission.execution import plain_modes
from xdit_ir.errors import XditError

aten = torch.ops.aten
TENSOR: Any = torch.Tensor
# Functions that give away a tensor's memory, or say where it is.
MEMORY = frozenset(
    {
        *(TENSOR.data_ptr, TENSOR.storage, TENSOR.untyped_storage, TENSOR._typed_storage, TENSOR.numpy),
        *(TENSOR.__dlpack__, TENSOR.share_memory_, TENSOR.is_shared, TENSOR.__cuda_array_interface__.__get__),
    }
)
KINDS = ("cpu", "cuda")  # devices on which whoever reads may be under autocast


class Deferred(torch.Tensor):
    """A tensor whose contents are a `RecordedValue`; has its shape, dtype and device, and behaves like any other.

    `is_lent`: what is outside (an array, a pointer) may share its memory, so that all writes must go there.
    """

    value: RecordedValue
    views: list[weakref.ref[Deferred]]
    origin: tuple[Deferred, Any, Any, Any, int | None] | None
    is_lent: bool

    @staticmethod
    def __new__(cls, value: RecordedValue) -> Deferred:
        with torch.inference_mode(False):  # views of what was made outside must be as that is
            made: Deferred = torch.Tensor._make_wrapper_subclass(
                cls, value.shape, strides=value.stride, dtype=value.dtype, device=value.device, requires_grad=False
            )
        torch._C._set_throw_on_mutable_data_ptr(made)  # in C, where nothing below is asked: raises instead of crashing
        made.value, made.views, made.origin, made.is_lent = value, [], None, False
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return materialize(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return materialize(self).clone()

    def numpy(self, *, force: bool = False) -> Any:
        """As `Tensor.numpy`, of the whole value."""
        return _lent(self).numpy(force=force)

    def tolist(self) -> Any:
        """As `Tensor.tolist`, of the whole value."""
        return materialize(self).tolist()

    def __format__(self, spec: str) -> str:
        return format(materialize(self), spec) if spec else repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and all(isinstance(leaf, torch.Tensor) for leaf in args[1:]):
            return _noted(func, args, kwargs or {})
        if func in MEMORY:
            given = func(_lent(args[0]), *args[1:], **(kwargs or {}))
            return args[0] if given is args[0].value.done else given
        if func is TENSOR.tolist:
            return args[0].tolist()
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
    made: tuple[Any, Numbered] | None = None,
) -> Deferred:
    """A tensor for what `source` will give; `made`: by whom, and which result, which is noted in what is made of it."""
    like = torch.empty(tuple(shape), device="meta")
    lineage = {} if made is None else {made[0]: Descent.of(made[1], like.dim(), _samples(like))}
    return Deferred(RecordedValue(like.shape, like.stride(), dtype, device, source=source, lineage=lineage))


def descents_of(maker: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, Descent]:
    """From which of a maker's results inputs were made, of those that were made of one."""
    found = {name: x.value.lineage.get(maker) for name, x in inputs.items() if isinstance(x, Deferred)}
    return {name: one for name, one in found.items() if one is not None}


def _samples(like: torch.Tensor) -> Samples | None:
    return Samples.of(len(like)) if like.dim() else None


def is_separable(tensor: torch.Tensor, dim: int, start: int, stop: int) -> bool:
    """Whether `materialize_slice` would compute no more than this range."""
    return not isinstance(tensor, Deferred) or tensor.value.is_separable(Range(dim, start, stop))


def materialize_slice(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """A range of one dimension, from as little of what it was made of as possible."""
    if not isinstance(tensor, Deferred):
        return tensor.narrow(dim, start, stop - start)
    with plain_modes(*KINDS):
        part = tensor.value.pull(Range(dim, start, stop))
        return tensor.value.whole().narrow(dim, start, stop - start) if part is None else part


def materialize(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor; waits for all of it."""
    if not isinstance(tensor, Deferred):
        return tensor
    with plain_modes(*KINDS):
        return tensor.value.whole()


def _record(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _needs_shapes_only(func):
        args, kwargs = pytree.tree_map_only(Deferred, _like, (args, kwargs))
        return func(*args, **kwargs)
    if func._schema.is_mutable or func.namespace == "c10d":
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
    is_view = any(one.alias_info is not None for one in func._schema.returns) if hasattr(func, "_schema") else False
    args, kwargs = pytree.tree_map_only(Deferred, _lent if is_view else materialize, (args, kwargs))
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
        value = RecordedValue(
            meta.shape, meta.stride(), meta.dtype, meta.device, None, func, frozen_args, frozen_kwargs, index
        )
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


def _frozen(tensor: torch.Tensor) -> RecordedValue | Kept:
    if isinstance(tensor, Deferred):
        return Kept.of(materialize(tensor)) if _root(tensor).is_lent else tensor.value
    return Kept.of(tensor)


def _in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A write to a deferred tensor that shares memory with none makes it stand for the result."""
    targets = _targets(func, args, kwargs)
    if torch.Tag.inplace_view in func.tags and targets:
        name = func._schema.name.partition("::")[2]
        raise XditError(f"{name} cannot change the shape of a result that is still being computed; make another tensor")
    target = targets[0] if targets else None
    name = func._schema.name.partition("::")[2]
    functional = getattr(getattr(aten, name[:-1], None), func._overloadname, None) if name.endswith("_") else None
    if target is not args[0] or functional is None or not is_recordable(functional) or _shares(target):
        return _written(func, args, kwargs, targets)
    value = _value(_noted(functional, args, kwargs))
    if value.dtype != target.dtype:
        value = _value(_noted(aten._to_copy.default, (Deferred(value),), {"dtype": target.dtype}))
    target.value = value
    return target


def _targets(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Deferred]:
    """The deferred tensors that an operator writes to; collectives do not say, so all of them."""
    written: Any = (args, kwargs)
    if func._schema.is_mutable:
        given = zip(func._schema.arguments, args, strict=False)
        named = ((one, kwargs.get(one.name)) for one in func._schema.arguments[len(args) :])
        written = [item for one, item in (*given, *named) if one.alias_info is not None and one.alias_info.is_write]
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, Deferred)]


def _shares(member: Deferred) -> bool:
    return member.is_lent or member.origin is not None or bool(_living(member))


def _written(func: Any, args: Any, kwargs: dict[str, Any], targets: Sequence[Deferred]) -> Any:
    """Give families of views plain memory of their own, and write to that."""
    for target in targets:
        root = _root(target)
        if not root.is_lent:
            _settle_family(root, materialize(root).clone())
        root.value.lineage = {}
    plain_args, plain_kwargs = pytree.tree_map_only(Deferred, materialize, (tuple(args), kwargs))
    result = func(*plain_args, **plain_kwargs)
    known = {id(target.value.done): target for target in targets}
    return pytree.tree_map_only(torch.Tensor, lambda x: known.get(id(x), x), result)


def _root(member: Deferred) -> Deferred:
    while member.origin is not None:
        member = member.origin[0]
    return member


def _lent(member: torch.Tensor) -> torch.Tensor:
    """A deferred tensor's memory, which is its own and stays so: what else is made of it does not change with it."""
    if not isinstance(member, Deferred):
        return member
    root = _root(member)
    if not root.is_lent:
        with plain_modes(*KINDS):
            lineage = root.value.lineage
            _settle_family(root, materialize(root).clone())
            root.value.lineage = lineage
        root.is_lent = True
    return materialize(member)


def _settle_family(member: Deferred, plain: torch.Tensor) -> None:
    member.value = _value(plain)
    for view in _living(member):
        assert view.origin is not None
        _, func, rest, kwargs, index = view.origin
        result = func(plain, *rest, **kwargs)
        _settle_family(view, result if index is None else result[index])


def _living(member: Deferred) -> list[Deferred]:
    return [view for view in (ref() for ref in member.views) if view is not None]


def _value(tensor: torch.Tensor) -> RecordedValue:
    if isinstance(tensor, Deferred):
        return tensor.value
    return RecordedValue(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, done=tensor)

"""What forward was given, what it leaves there, and how the same is done to the arguments of later calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.objects import expand_objects, restore_objects
from xdit_ir.capture.outputs import literal
from xdit_ir.capture.values import TracedValue
from xdit_ir.errors import TraceError
from xdit_ir.ir.effects import ITSELF, Effect, Literal, PathEntry
from xdit_ir.ir.program import Signature
from xdit_ir.reflection.atoms import is_plain_object
from xdit_ir.reflection.fingerprint import describe

_DEPTH = 4
_PLAIN = (str, bytes, int, float, bool, complex, type(None))
_MISSING = object()
Path = tuple[PathEntry, ...]


@dataclass(frozen=True, eq=False)
class _Holder:
    """A list, dict or object among the arguments, and its entries before the call."""

    path: Path
    item: Any
    before: dict[Any, Any]


class ArgumentState:
    """The arguments of the traced call: tensors as fakes, objects as copies, in containers of their own."""

    def __init__(self, leaves: Mapping[str, Any], spec: pytree.TreeSpec, copy_of: Callable[[Any], Any]) -> None:
        for path, leaf in leaves.items():
            if not isinstance(leaf, torch.Tensor) and _holds_tensors(leaf, _DEPTH):
                kind = type(leaf).__qualname__
                raise TraceError(f"input {path!r} is of type {kind}, inside which tensors cannot be followed")
        copies = [x if isinstance(x, torch.Tensor) else copy_of(x) for x in leaves.values()]
        self.named: dict[str, Any] = restore_objects(pytree.tree_unflatten(copies, spec))
        inside = list(walk(self.named, (), set()))
        self._holders = [_Holder(path, item, _entries(item)) for path, item in inside if path and _is_holder(item)]
        self._tensors = [(path, item) for path, item in inside if isinstance(item, torch.Tensor)]
        others = [(path, item) for path, item in inside if not _is_holder(item) and not isinstance(item, torch.Tensor)]
        self._others = [(path, item, describe(item)) for path, item in others]

    @property
    def callables(self) -> list[tuple[str, Any]]:
        """Functions and the like among the arguments, and what they are called."""
        return [(_show(path), item) for path, item, _ in self._others if callable(item)]

    def check_referring(self, exchanged: Callable[[Any], Any]) -> None:
        """Raise `TraceError` if an argument, or a key of one, refers to a module or weight of the model: what
        `exchanged` gives something else for."""
        tensors: list[tuple[Path, Any]] = [(path, None) for path, _ in self._tensors]
        for path, item in [*((path, item) for path, item, _ in self._others), *tensors]:
            if exchanged(item) is not item or any(exchanged(step.key) is not step.key for step in path):
                raise TraceError(f"input {_show(path)!r} refers to a module or weight of the model, by its identity")

    def effects(self, values: Mapping[str, TracedValue], place: Callable[[torch.Tensor], int]) -> tuple[Effect, ...]:
        """What forward did to the arguments; `place` makes a tensor one of the program's results."""
        for path, item, before in self._others:
            if describe(item) != before:
                raise TraceError(f"forward writes to {_show(path)}, an object of type {type(item).__qualname__}")
        written = {id(value.fake) for value in values.values() if value.storage.version}
        writes = [Effect(path, (place(item),), write=True) for path, item in self._tensors if id(item) in written]
        return (*writes, *(effect for holder in self._holders for effect in self._changes(holder, place)))

    def _changes(self, holder: _Holder, place: Callable[[torch.Tensor], int]) -> Iterator[Effect]:
        after = _entries(holder.item)
        attribute = not isinstance(holder.item, (list, dict))
        for key, item in after.items():
            if not _unchanged(item, holder.before.get(key, _MISSING)):
                path = (*holder.path, PathEntry(key, attribute))
                inside = [entry for _, entry in walk(item, path, set())]
                if any(held.item is entry for held in self._holders for entry in inside):
                    raise TraceError(f"forward moves a container that it was given to {_show(path)}")
                leaves, spec = pytree.tree_flatten(expand_objects(item))
                made = (place(x) if isinstance(x, torch.Tensor) else literal(x) for x in leaves)
                yield Effect(path, tuple(made), spec)
        for key in [key for key in reversed(holder.before) if key not in after]:
            yield Effect((*holder.path, PathEntry(key, attribute)))


def apply_effects(
    signature: Signature, tensors: Sequence[torch.Tensor], named: Mapping[str, Any], model: nn.Module
) -> None:
    """Do to a call's arguments and the model what forward would have done; `tensors` are the program's results."""
    named = {**named, ITSELF: model}
    holders = [_at(named, effect.path[: None if effect.write else -1]) for effect in signature.effects]
    for effect, holder in zip(signature.effects, holders, strict=True):
        if effect.write:
            with torch.inference_mode(holder.is_inference()), torch.no_grad():
                holder.copy_(tensors[effect.leaves[0]])  # type: ignore[index]
            continue
        step = effect.path[-1]
        if effect.spec is None:
            delattr(holder, step.key) if step.attribute else holder.pop(step.key)
            continue
        leaves = [copy.deepcopy(x.value) if isinstance(x, Literal) else tensors[x] for x in effect.leaves]
        item = restore_objects(pytree.tree_unflatten(leaves, effect.spec))
        if step.attribute:
            setattr(holder, step.key, item)
        elif isinstance(holder, list) and step.key == len(holder):
            holder.append(item)
        else:
            holder[step.key] = item


def copied(item: Any, seen: dict[int, Any] | None = None) -> Any:
    """A copy of arguments that shares no tensor, container or plain object with them; what is neither is shared."""
    seen = {} if seen is None else seen
    if id(item) in seen:
        return seen[id(item)]
    if isinstance(item, torch.Tensor):
        seen[id(item)] = item.detach().clone()
    elif type(item) is tuple:
        seen[id(item)] = tuple(copied(entry, seen) for entry in item)
    elif _is_holder(item):
        seen[id(item)] = made = copy.copy(item)
        for key, entry in _entries(item).items():
            if isinstance(item, (list, dict)):
                made[key] = copied(entry, seen)
            else:
                made.__dict__[key] = copied(entry, seen)
    return seen.get(id(item), item)


def _at(tree: Any, path: Path) -> Any:
    for step in path:
        tree = getattr(tree, step.key) if step.attribute else tree[step.key]
    return tree


def _show(path: Path) -> str:
    return f"{path[0].key}{''.join(map(str, path[1:]))}"


def _unchanged(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before) and isinstance(now, _PLAIN) and bool(now == before))


def _entries(item: Any) -> dict[Any, Any]:
    if isinstance(item, dict):
        return dict(item)
    return dict(enumerate(item)) if isinstance(item, list) else dict(vars(item))


def _is_holder(item: Any) -> bool:
    """Whether forward can leave something in this, and we can follow it."""
    if isinstance(item, (torch.Tensor, nn.Module, type)) or callable(item):
        return False
    return isinstance(item, (list, dict)) or (is_plain_object(type(item)) and hasattr(item, "__dict__"))


def walk(item: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    """Everything in a tree of containers and plain objects, with its path; containers once each."""
    if isinstance(item, tuple):
        parts: dict[Any, Any] = dict(enumerate(item))
    elif _is_holder(item):
        if id(item) in seen:
            return
        seen.add(id(item))
        yield path, item
        parts = _entries(item)
    else:
        yield path, item
        return
    attribute = not isinstance(item, (list, dict, tuple))
    for key, entry in parts.items():
        yield from walk(entry, (*path, PathEntry(key, attribute)), seen)


def _holds_tensors(item: Any, depth: int) -> bool:
    if isinstance(item, (torch.Tensor, nn.Module)):
        return True
    if not depth or isinstance(item, type):
        return False
    inside = list(vars(item).values()) if hasattr(item, "__dict__") else []
    if isinstance(item, Mapping):
        inside += item.values()
    elif isinstance(item, (list, tuple, set)):
        inside += item
    return any(_holds_tensors(entry, depth - 1) for entry in inside)

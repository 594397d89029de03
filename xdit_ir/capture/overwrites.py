"""What forward leaves in attributes of the model at every call, and does not read before: results of the program, which
are put there after each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.effects import Path, walk
from xdit_ir.capture.objects import expand_objects
from xdit_ir.capture.outputs import literal
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.state import StateWrite
from xdit_ir.capture.values import Origin, expand
from xdit_ir.ir.effects import ITSELF, Effect, PathEntry
from xdit_ir.reflection.atoms import ATOMS, alike, same_entries
from xdit_ir.reflection.fakes import device_of
from xdit_ir.reflection.parts import MISSING, Entries

_BESIDE = ("_parameters", "_modules")


class _Unread(torch.Tensor):
    """Stands for what an earlier call has left: it is no plain tensor, and so refused wherever it is used."""


@dataclass(frozen=True, eq=False)
class Overwrite:
    """An entry that forward writes in the caller's `held`, at `path` from the model, and what the trace left there."""

    path: Path
    held: dict[Any, Any]
    key: Any
    value: Any

    def effect(self, place: Callable[[torch.Tensor], int]) -> Effect:
        """That it is done at every call; `place` makes a tensor one of the program's results."""
        leaves, spec = pytree.tree_flatten(expand_objects(self.value))
        return Effect(self.path, tuple(place(x) if isinstance(x, torch.Tensor) else literal(x) for x in leaves), spec)


def overwrites(
    found: Iterable[StateWrite], originals: Mapping[int, Any], recorder: Recorder, model: nn.Module
) -> list[Overwrite]:
    """Those entries of `found` that hold tensors which follow from what forward was given, in objects that can be found
    again from the model."""
    holders: dict[int, tuple[Path, Any, bool]] | None = None
    made: list[Overwrite] = []
    for write in found:
        if not isinstance(write.part, Entries):
            continue
        for key, item in write.after.items():
            if alike(item, write.before.get(key, MISSING)) or not _computed(recorder, item):
                continue
            holders = _holders(model) if holders is None else holders
            held = originals.get(id(write.part.item), write.part.item)
            if id(held) in holders and isinstance(key, (str, int)):
                path, _, attribute = holders[id(held)]
                made.append(Overwrite((*path, PathEntry(key, attribute)), held, key, item))
    return made


def trials(made: Sequence[Overwrite]) -> Iterator[list[StateWrite]]:
    """Writes after which a trace has to give the same program, if no entry is read before it is written: without them,
    and with what an earlier call, of this shape or another one, may have left there."""
    parts = {id(one.held): Entries(one.held, "") for one in made}
    before = {key: dict(part.read()) for key, part in parts.items()}
    without = {key: dict(held) for key, held in before.items()}
    for one in made:
        without[id(one.held)].pop(one.key, None)
    tried = [without]
    for more in ((), (3,)):
        tried.append({key: dict(held) for key, held in without.items()})
        for one in made:
            tried[-1][id(one.held)][one.key] = pytree.tree_map_only(torch.Tensor, partial(_unread, more), one.value)
    for after in tried:
        yield [
            StateWrite(part, before[key], after[key])
            for key, part in parts.items()
            if not same_entries(after[key], before[key])
        ]


def beside(write: StateWrite, held: Any, made: Iterable[Overwrite]) -> StateWrite:
    """What else was written to `held`."""
    keys = {one.key for one in made if one.held is held}
    if not keys:
        return write
    after = {
        key: write.before[key] if key in keys else item
        for key, item in write.after.items()
        if key not in keys or key in write.before
    }
    return replace(write, after=after)


def overwritten(model: nn.Module, effects: Iterable[Effect]) -> frozenset[tuple[int, Any]]:
    """The entries of which programs say that they are written and not read before, by the id of what holds them."""
    paths = {effect.path for effect in effects if effect.path[0].key == ITSELF}
    if not paths:
        return frozenset()
    return frozenset(
        (held, path[-1].key)
        for held, (base, _, attribute) in _holders(model).items()
        for path in paths
        if path[:-1] == base and path[-1].attribute == attribute
    )


def _computed(recorder: Recorder, item: Any) -> bool:
    """Whether it is a tree of tensors of the trace, of which one follows from inputs, and of plain values."""
    leaves = pytree.tree_leaves(expand_objects(item))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    values = [recorder.found(leaf) for leaf in tensors]
    if any(value is None for value in values) or not all(isinstance(leaf, (*ATOMS, torch.Tensor)) for leaf in leaves):
        return False
    roots = {root for value in values if value is not None for root in expand(value.roots)}
    return any(isinstance(root, str) or root is Origin.RANDOM for root in roots)


def _unread(more: tuple[int, ...], tensor: torch.Tensor) -> torch.Tensor:
    device = device_of(tensor)
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(*more, *tensor.shape).as_subclass(_Unread)


def _holders(model: nn.Module) -> dict[int, tuple[Path, Any, bool]]:
    """Attributes, buffers, dicts and objects of a model by their ids: the path, the dict, whether for attributes."""
    found: dict[int, tuple[Path, Any, bool]] = {}
    for name, module in model.named_modules():
        base: Path = (PathEntry(ITSELF), *(PathEntry(step, attribute=True) for step in name.split(".") if step))
        own = vars(module)
        for held in (own, own["_buffers"]):
            found.setdefault(id(held), (base, held, True))
        for key, item in own.items():
            if key in _BESIDE:
                continue
            for path, holder in walk(item, (*base, PathEntry(key, attribute=True)), set()):
                if isinstance(holder, dict):
                    found.setdefault(id(holder), (path, holder, False))
                elif hasattr(holder, "__dict__") and not isinstance(holder, (nn.Module, type)):
                    found.setdefault(id(vars(holder)), (path, vars(holder), True))
    return found

"""What forward may read of a model besides its tensors: noticed when it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.skeleton import is_plain_object

_TENSORS = ("_parameters", "_buffers")
_OWN = frozenset(vars(nn.Module()))  # these containers are never replaced by others
_ATOMS = (str, bytes, int, float, bool, complex, type(None), type, torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to the very container that is watched by itself."""

    item: Any

    def __eq__(self, other: object) -> bool:
        return other is self.item

    def __hash__(self) -> int:
        return id(self.item)


class ModelSettings:
    """Submodules, plain attributes and hooks of all modules of a model, and what lists, dicts and plain objects there
    hold, as they are now. Contents of parameters and buffers are not part of it.

    A trace depends on all of this; on most of it in fact not, so that a change means: trace again to be sure.
    """

    def __init__(self, model: nn.Module) -> None:
        self._empty: list[Any] = []
        self._held: list[tuple[Any, Any]] = []
        self._constants: list[tuple[torch.Tensor, int]] = []
        seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        waiting: list[Any] = [model]
        while waiting:
            item = waiting.pop()
            if id(item) not in seen:
                seen.add(id(item))
                waiting.extend(self._watch(item))

    def unchanged(self) -> bool:
        """Whether everything is as it was when this was made."""
        try:
            same = not any(self._empty) and all(now == before for now, before in self._held)
        except (RuntimeError, ValueError):  # an array in the place of another: its comparison has no truth value
            return False
        return same and all(tensor._version == version for tensor, version in self._constants)

    def _watch(self, item: Any) -> Iterator[Any]:
        """Note what a container holds; gives the containers and tensors in it."""
        if isinstance(item, torch.Tensor):
            if not item.is_inference():  # those have no count of writes, and cannot be written to outside
                self._constants.append((item, item._version))
            return
        holder: Any = vars(item) if isinstance(item, nn.Module) or _is_object(item) else item
        if not holder:
            self._empty.append(holder)
        elif isinstance(holder, dict):
            skipped = _TENSORS if isinstance(item, nn.Module) else ()
            own = _OWN if isinstance(item, nn.Module) else ()
            inner = {key: entry for key, entry in holder.items() if key not in skipped and _holds(entry)}
            marked = {key: _Same(entry) for key, entry in inner.items() if key not in own and _mutable(entry)}
            self._held.append((holder, dict(holder) | marked))
            yield from inner.values()
        elif isinstance(holder, list):
            self._held.append((holder, [_Same(entry) if _mutable(entry) else entry for entry in holder]))
            yield from filter(_holds, holder)
        elif isinstance(holder, set):
            self._held.append((holder, set(holder)))
        else:
            yield from filter(_holds, holder)


def _is_object(item: Any) -> bool:
    return not isinstance(item, (dict, list, tuple, set)) and is_plain_object(type(item)) and hasattr(item, "__dict__")


def _holds(item: Any) -> bool:
    """Whether something inside may change."""
    if isinstance(item, _ATOMS):
        return False
    return isinstance(item, (torch.Tensor, nn.Module, dict, list, tuple, set)) or _is_object(item)


def _mutable(item: Any) -> bool:
    return _holds(item) and not isinstance(item, (torch.Tensor, tuple, nn.Module))

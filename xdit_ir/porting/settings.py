"""What forward may read of a model and around it besides tensors: noticed when it changes."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from types import CellType
from typing import Any

import torch
from torch import nn

from xdit_ir.reflection.atoms import alike, same_entries
from xdit_ir.reflection.hidden_state import DRAWN
from xdit_ir.reflection.parts import Cell, Defaults, Names, Part, attributes_of
from xdit_ir.reflection.reach import BESIDE, Reach
from xdit_ir.reflection.tree import modules_of
from xdit_ir.reflection.versions import Versions

_STATE = ("_parameters", "_buffers")
# Containers of every module, which nobody replaces by others.
_OWN = BESIDE | {*_STATE, "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_FUNCTION = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_VERSION, _CONTENTS = attrgetter("_version"), attrgetter("cell_contents")
_PLAIN = (dict, OrderedDict, list, deque, set)
_END = ((object(),),)  # behind the elements of a list, so that none may go over to the next one
Read = Callable[[], Iterable[Any]]


class _Values:
    """What is read, as it was: the same objects, or equal numbers and texts."""

    __slots__ = ("_before", "_read")

    def __init__(self, read: Read) -> None:
        self._read, self._before = read, tuple(read())

    def same(self) -> bool:
        """Whether it is as it was."""
        now = tuple(self._read())
        if len(now) != len(self._before) or not all(map(alike, now, self._before)):
            return False
        self._before = now
        return True


class _Seen:
    """What matters of plain dicts whose versions somebody else has looked at just before."""

    def __init__(self, places: Versions, reads: Iterable[Read]) -> None:
        self._places, self._accepted, self._values = places, places.accepted, list(map(_Values, reads))

    def same(self) -> bool:
        """Whether they are as they were."""
        if self._places.accepted != self._accepted:
            if not all(one.same() for one in self._values):
                return False
            self._accepted = self._places.accepted
        return True


class _Dicts:
    """Plain dicts, and what of each matters. They are looked at in the order in which they lie in memory."""

    def __init__(self, watched: Iterable[tuple[dict[Any, Any], Read]]) -> None:
        watched = sorted(watched, key=lambda one: id(one[0]))
        self._versions = Versions([held for held, _ in watched])
        self._values = [_Values(read) for _, read in watched]

    def same(self) -> bool:
        """Whether they are as they were."""
        changed = self._versions.changed()
        if changed:
            if not all(self._values[place].same() for place in changed):
                return False
            self._versions.accept()
        return True


class _Group:
    """Parts, with a quick way to read the objects in all of them; if these are not the same, they are compared one by
    one."""

    def __init__(self, parts: Iterable[Part], read: Read) -> None:
        self._parts = [(part, dict(part.read())) for part in parts]
        self._read, self._before = read, list(read())

    def same(self) -> bool:
        """Whether they are as they were."""
        if all(map(is_, self._read(), self._before)):
            return True
        if not all(same_entries(part.read(), before) for part, before in self._parts):
            return False
        self._before = list(self._read())
        return bool(self._parts)


class ModelSettings:
    """Submodules, attributes, hooks, globals, closures and classes of a model and its code, as they are now. Contents
    of parameters and buffers are not part of it.

    A trace depends on all of this; on most of it in fact not, so that a change means: trace again to be sure. The
    same goes for code of objects in `given`, which forward gets. Entries `unread`, by the id of the dict that holds
    them, are written before they are read. `places`: dicts whose versions are looked at before each `unchanged`.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Iterable[Any] = (),
        unread: Set[tuple[int, Any]] = frozenset(),
        places: Versions | None = None,
    ) -> None:
        code = _code(given)
        self._asked = model, [item for _, item in code], unread, places
        self._reach = reach = Reach([("", model), *code], unread)
        modules = [module for _, module in reach.modules]
        typed = [*modules, *reach.objects]
        owners, hiding = _owners(reach.objects)
        used = set(modules_of(model))  # of others a program keeps the weights themselves
        states = [vars(module)[name] for module in modules if module in used for name in _STATE]
        kept = [tensor for module in modules if module not in used for tensor in _weights(module)]
        dicts, parts = _split((*reach.parts, *reach.library), modules, states, unread)
        parts = [part for part in parts if not isinstance(part.item, DRAWN)]  # forward may not draw from these
        empty = {part for part in parts if type(part.item) in _PLAIN and not part.item}
        self._empty = sorted([*(part.item for part in empty), *(held for held in states if not held)], key=id)
        parts = [part for part in parts if part not in empty]
        lists = [part for part in parts if type(part.item) in (list, set, deque)]
        cells = [part for part in parts if type(part) is Cell and _is_filled(part.item)]
        functions = [part for part in parts if type(part) is Defaults]
        together = {*lists, *cells, *functions}
        seen = frozenset() if places is None else frozenset(map(id, places.held))
        self._watched: list[_Dicts | _Seen | _Group] = [
            _Group([], lambda: map(type, typed)),
            _Group([], lambda: map(vars, owners)),
            _Group([], lambda: map(attributes_of, hiding)),
            *([] if places is None else [_Seen(places, [read for held, read in dicts if id(held) in seen])]),
            _Dicts([(held, read) for held, read in dicts if id(held) not in seen]),
            _Group(lists, _elements([part.item for part in lists])),
            _Group(cells, _each(_CONTENTS, [part.item for part in cells])),
            _Group(functions, _chained(_each(_FUNCTION, [part.item for part in functions]))),
        ]
        self._ties = _ties(states)
        self._others = [(part, dict(part.read())) for part in parts if part not in together]
        held = [*(tensor for _, tensor in reach.tensors), *kept]
        constants = [tensor for tensor in held if not tensor.is_inference()]  # to those nobody can write
        self._versioned, self._versions = constants, list(map(_VERSION, constants))
        self._contents = [(tensor, tensor.detach().clone()) for tensor in constants if tensor.device.type == "cpu"]

    @staticmethod
    def like(
        earlier: Iterable[ModelSettings],
        model: nn.Module,
        given: Iterable[Any] = (),
        unread: Set[tuple[int, Any]] = frozenset(),
        places: Versions | None = None,
    ) -> ModelSettings:
        """One that is there already and says what a new one would, or a new one."""
        given = list(given)
        asked = model, [item for _, item in _code(given)], unread, places
        found = (one for one in earlier if _same_request(one._asked, asked) and one.unchanged())
        return next(found, None) or ModelSettings(model, given, unread, places)

    def unchanged(self) -> bool:
        """Whether everything is as it was when this was made."""
        try:
            return (
                not any(self._empty)
                and all(watch.same() for watch in self._watched)
                and list(map(_VERSION, self._versioned)) == self._versions
                and all(one is other for (left, a), (right, b) in self._ties for one, other in [(left[a], right[b])])
                and all(same_entries(part.read(), before) for part, before in self._others)
                and all(map(_equal, self._contents))
            )
        except (LookupError, AttributeError, ValueError):  # something was removed
            return False


def _owners(objects: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Objects with attributes; and those among them that do not show them."""
    held = [(item, attributes_of(item)) for item in objects]
    shown = [(item, getattr(item, "__dict__", None) is own) for item, own in held if type(own) is dict]
    return [item for item, shows in shown if shows], [item for item, shows in shown if not shows]


def _code(given: Iterable[Any]) -> list[tuple[str, Any]]:
    """Classes, functions and Python modules of what forward gets."""
    return Reach(("an argument", item) for item in given).code


def _same_request(one: Any, other: Any) -> bool:
    (model, code, unread, places), (its_model, its_code, its_unread, its_places) = one, other
    same_code = len(code) == len(its_code) and all(map(is_, code, its_code))
    return model is its_model and places is its_places and unread == its_unread and same_code


def _split(
    parts: Iterable[Part],
    modules: Sequence[nn.Module],
    states: Sequence[dict[str, Any]],
    unread: Set[tuple[int, Any]],
) -> tuple[list[tuple[dict[Any, Any], Read]], list[Part]]:
    """Those that are read only when a plain dict was changed, and the others."""
    attributes = {id(vars(module)) for module in modules}
    tensors = {id(held) for held in states}
    passed = {id(vars(module)["_non_persistent_buffers_set"]) for module in modules}
    passing = {owner: {key for other, key in unread if other == owner} for owner, _ in unread}
    dicts: list[tuple[dict[Any, Any], Read]] = []
    others: list[Part] = []
    for part in parts:
        item = part.item
        held = _dict_of(item) if isinstance(part, Names) else item
        if id(item) in passed or (id(item) in tensors and not item):
            continue
        gone = passing.get(id(item), frozenset[Any]())
        if type(held) is not dict or not (held or gone or isinstance(part, Names)):
            others.append(part)
        elif id(item) in attributes:
            dicts.append((held, partial(_attributes, held, _OWN | gone)))
        elif id(item) in tensors:
            dicts.append((held, partial(_tensors, held, gone)))
        elif isinstance(part, Names):
            dicts.append((held, partial(_entries, part.read)))
        else:
            dicts.append((held, partial(_entries, partial(_others, held, gone))))
    return dicts, others


def _weights(module: nn.Module) -> Iterable[torch.Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))


def _dict_of(item: Any) -> Any:
    """The dict behind the attributes of a class or Python module, or globals."""
    if isinstance(item, type):
        return gc.get_referents(vars(item))[0]
    return item if isinstance(item, dict) else vars(item)


def _others(held: dict[Any, Any], gone: Set[Any]) -> dict[Any, Any]:
    return {key: item for key, item in held.items() if key not in gone} if gone else held


def _entries(read: Callable[[], Mapping[Any, Any]]) -> Iterable[Any]:
    held = read()
    return chain(held, held.values())


def _attributes(held: dict[str, Any], gone: Set[str]) -> Iterable[Any]:
    """What a module has besides what is `gone`: containers of every module, and what is written before it is read."""
    return chain.from_iterable(entry for entry in held.items() if entry[0] not in gone)


def _tensors(held: dict[str, Any], gone: Set[str]) -> Iterable[Any]:
    """Names of parameters or buffers, and which are None."""
    held = _others(held, gone)
    return chain(held, (item is None for item in held.values()))


def _elements(items: Sequence[Any]) -> Read:
    return _chained(lambda: chain.from_iterable(zip(items, _END * len(items), strict=True)))


def _each(get: Callable[[Any], Any], items: Sequence[Any]) -> Read:
    return lambda: map(get, items)


def _chained(read: Read) -> Read:
    return lambda: chain.from_iterable(read())


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _ties(states: Sequence[dict[str, Any]]) -> list[tuple[tuple[Any, str], tuple[Any, str]]]:
    """Pairs of places where one parameter or buffer is."""
    first: dict[int, tuple[Any, str]] = {}
    places = [(state, name) for state in states for name, item in state.items() if item is not None]
    pairs = [(first.setdefault(id(place[0][place[1]]), place), place) for place in places]
    return [(one, other) for one, other in pairs if one is not other]


def _equal(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Of the contents of a tensor now and before: written to through `.data` or NumPy, it counts no version."""
    return torch.equal(*pair)

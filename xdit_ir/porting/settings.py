"""What forward may read of a model and around it besides tensors: noticed when it changes."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.parts import Attributes, Cell, Defaults, Elements, Entries, Names, Part, alike, same_entries
from xdit_ir.capture.reach import BESIDE, Reach

_STATE = ("_parameters", "_buffers")
# Containers of every module, which nobody replaces by others.
_OWN = BESIDE | {*_STATE, "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"}
_FUNCTION = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_VERSION, _CONTENTS = attrgetter("_version"), attrgetter("cell_contents")
Read = Callable[[], Iterable[Any]]


class _Flat:
    """Many values that are read at once, as they were: the same objects, or equal numbers and texts."""

    def __init__(self, read: Read) -> None:
        self._read, self._before = read, list(read())

    def same(self) -> bool:
        """Whether they are as they were."""
        if all(map(is_, self._read(), self._before)):
            return True
        now = list(self._read())
        if len(now) != len(self._before) or not all(map(alike, now, self._before)):
            return False
        self._before = now  # equal, but not the same: compared faster from now on
        return True


class ModelSettings:
    """Submodules, attributes, hooks, globals, closures and classes of a model and its code, as they are now. Contents
    of parameters and buffers are not part of it.

    A trace depends on all of this; on most of it in fact not, so that a change means: trace again to be sure.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reach = reach = Reach([("", model)])
        modules = [module for _, module in reach.modules]
        sorts = _sorted((*reach.parts, *reach.library), modules)
        dicts = [part.item for part in (*sorts[Entries], *sorts[Attributes])]
        lists = [part.item for part in sorts[Elements]]
        states = [vars(module)[name] for module in modules for name in _STATE]
        self._empty = [item for item in (*dicts, *lists, *states) if not item]
        self._sized = [item for item in (*dicts, *lists, *states, *map(vars, modules)) if item]
        self._sizes = list(map(len, self._sized))
        self._flat = [
            _Flat(lambda: map(type, modules)),
            _attributes(modules),
            _Flat(_chained([item for item in dicts if item])),
            _Flat(_chained([item.values for item in dicts if item], called=True)),
            _Flat(_chained([item for item in lists if item])),
            _names(sorts[Names]),
            _Flat(_each(_CONTENTS, [part.item for part in sorts[Cell]])),
            _Flat(_functions([part.item for part in sorts[Defaults]])),
            _Flat(_chained([item for item in states if item])),
            _absent(states),
        ]
        self._ties = _ties(states)
        self._others = [(part, dict(part.read())) for part in sorts[Part]]
        constants = [tensor for _, tensor in reach.tensors if not tensor.is_inference()]  # those nobody can write to
        self._versioned, self._versions = constants, list(map(_VERSION, constants))
        self._contents = [(tensor, tensor.detach().clone()) for tensor in constants if tensor.device.type == "cpu"]

    def unchanged(self) -> bool:
        """Whether everything is as it was when this was made."""
        try:
            return (
                not any(self._empty)
                and list(map(len, self._sized)) == self._sizes
                and all(flat.same() for flat in self._flat)
                and list(map(_VERSION, self._versioned)) == self._versions
                and all(one is other for (left, a), (right, b) in self._ties for one, other in [(left[a], right[b])])
                and all(same_entries(part.read(), before) for part, before in self._others)
                and all(map(_equal, self._contents))
            )
        except (LookupError, AttributeError, ValueError):  # something was removed
            return False


def _sorted(parts: Iterable[Part], modules: Sequence[nn.Module]) -> dict[type[Part], list[Any]]:
    """Parts by how they are read together; those under `Part` are read alone, those of modules themselves are left
    out."""
    own = {id(vars(module)) for module in modules}
    own |= {id(vars(module)[name]) for module in modules for name in (*_STATE, "_non_persistent_buffers_set")}
    found: dict[type[Part], list[Any]] = defaultdict(list)
    for part in parts:
        if id(part.item) in own:
            continue
        kind = type(part)
        if isinstance(part, Entries):
            kind = Entries if type(part.item) in (dict, OrderedDict) else Part
        found[kind if kind in (Entries, Elements, Names, Cell, Defaults) else Part].append(part)
    return found


def _chained(items: Sequence[Any], *, called: bool = False) -> Read:
    """All elements of some containers, or of what functions give."""
    return (lambda: chain.from_iterable(map(call, items))) if called else (lambda: chain.from_iterable(items))


def _each(get: Callable[[Any], Any], items: Sequence[Any]) -> Read:
    return lambda: map(get, items)


def _functions(functions: Sequence[Any]) -> Read:
    return lambda: chain.from_iterable(map(_FUNCTION, functions))


def _got(getters: Sequence[tuple[Sequence[str], Any]]) -> Read:
    """The values of some names of some mappings."""
    padded = [((*names, *names) if len(names) == 1 else names, held) for names, held in getters if names]
    found = [(itemgetter(*names), held) for names, held in padded]  # of two or more names: a tuple
    get, items = [one for one, _ in found], [held for _, held in found]
    return lambda: chain.from_iterable(map(call, get, items))


def _attributes(modules: Sequence[nn.Module]) -> _Flat:
    return _Flat(_got([([name for name in vars(module) if name not in _OWN], vars(module)) for module in modules]))


def _names(spaces: Sequence[Names]) -> _Flat:
    """Names that are there, and the absence of others."""
    present = [(list(space.read()), space.held) for space in spaces]
    absent = [
        (name, space)
        for space, (there, _) in zip(spaces, present, strict=True)
        for name in space.names
        if name not in there
    ]
    read = _got(present)
    missing = list(dict.fromkeys(space for _, space in absent))
    return _Flat(lambda: chain(read(), (len(space.read()) for space in missing)))


def _absent(states: Sequence[dict[str, Any]]) -> _Flat:
    """Parameters and buffers that are None."""
    return _Flat(_got([([name for name, item in state.items() if item is None], state) for state in states]))


def _ties(states: Sequence[dict[str, Any]]) -> list[tuple[tuple[Any, str], tuple[Any, str]]]:
    """Pairs of places where one parameter or buffer is."""
    first: dict[int, tuple[Any, str]] = {}
    places = [(state, name) for state in states for name, item in state.items() if item is not None]
    pairs = [(first.setdefault(id(place[0][place[1]]), place), place) for place in places]
    return [(one, other) for one, other in pairs if one is not other]


def _equal(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Of the contents of a tensor now and before: written to through `.data` or NumPy, it counts no version."""
    return torch.equal(*pair)

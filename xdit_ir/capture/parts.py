"""Python objects as what can be read of them and put back: attributes, entries, elements, cells, bytes."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import types
from collections import OrderedDict, UserList, deque
from collections.abc import Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_ir.capture.fakes import is_fake
from xdit_ir.capture.hidden import HIDING, hidden_state, hides, put_hidden_state

ATOMS = (
    str,
    bytes,
    int,
    float,
    bool,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    range,
    slice,
    np.generic,
)
_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}
# Of libraries, what is of the process and not of a model, or keeps what it has computed of itself.
_OF_THE_PROCESS = {
    *("logging", "typing", "importlib", "_frozen_importlib", "_frozen_importlib_external", "multiprocessing"),
    *("concurrent", "asyncio", "inspect", "pathlib", "abc", "types", "contextlib"),
}
_OF_MODELS = ("torch.nn.", "torch.distributions.")
_HOLDERS = (
    *(dict, list, set, deque, MutableMapping, types.SimpleNamespace, nn.Module),
    *(np.ndarray, bytearray, ContextVar, queue.Queue, UserList, types.FunctionType, types.CellType),
    *(threading.local, types.MappingProxyType, *HIDING),
)
MISSING = object()
_IMPORTED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_EMPTY = object()


class Part:
    """One kind of contents of one object, called `label` in messages."""

    def __init__(self, item: Any, label: str) -> None:
        self.item, self.label = item, label

    def read(self) -> Mapping[Any, Any]:
        """What is held, by key; may be the very mapping in which it is held."""
        raise NotImplementedError

    def put(self, held: Mapping[Any, Any]) -> None:
        """Make `held` what is held, and nothing else."""
        raise NotImplementedError

    def of(self, item: Any) -> Part:
        """The same part of another object."""
        return type(self)(item, self.label)

    def name(self, key: Any) -> str:
        """An entry, for messages."""
        return f"{self.label}[{_text(key)}]"


class Single(Part):
    """Contents of an object that are one entry, which is called as the object is."""

    def name(self, key: Any) -> str:
        return self.label


class Named(Part):
    """Contents by names that are those of attributes."""

    def name(self, key: Any) -> str:
        return f"{self.label}.{key}"


class Entries(Part):
    """Of a dict; of a subclass too, without its own methods."""

    def read(self) -> Mapping[Any, Any]:
        return self.item if type(self.item) is dict else dict(self._kind.items(self.item))

    def put(self, held: Mapping[Any, Any]) -> None:
        kept = dict(held)
        self._kind.clear(self.item)
        self._kind.update(self.item, kept)

    @property
    def _kind(self) -> type[dict[Any, Any]]:
        return OrderedDict if isinstance(self.item, OrderedDict) else dict


class Attributes(Entries):
    """Of a module, object or function: `item` is its `__dict__`."""

    def name(self, key: Any) -> str:
        return f"{self.label}.{key}" if self.label else str(key)


class Names(Named):
    """Some of the names of a class, Python module or `__dict__`: those that code uses. Of a class that is looked into
    also those that are new."""

    def __init__(self, item: Any, label: str) -> None:
        super().__init__(item, label)
        self.names: list[str] = []
        self._first: set[str] = set()
        grows = isinstance(item, type) and not is_library(item.__module__)
        self._old = frozenset(self.held) if grows else None

    def note(self, name: str) -> None:
        """Watch one more."""
        self.names.append(name)
        if name in self.held:
            self._first.add(name)

    @property
    def held(self) -> Mapping[str, Any]:
        """All names."""
        held: Mapping[str, Any] = self.item if isinstance(self.item, dict) else vars(self.item)
        return held

    def read(self) -> Mapping[Any, Any]:
        held, first = self.held, self._first
        found = {name: held[name] for name in self.names if name in held}
        late = [name for name in found if name not in first and isinstance(found[name], _IMPORTED)]
        for name in late:  # code that was imported at its first use
            del found[name]
        if self._old is not None and len(held) > len(self._old):
            found |= {name: held[name] for name in held if name not in self._old and not name.startswith("__")}
        return found

    def put(self, held: Mapping[Any, Any]) -> None:
        now = self.read()
        for name in dict.fromkeys((*self.names, *now)):
            if name not in held and name in now:
                self._delete(name)
            elif name in held and now.get(name, MISSING) is not held[name]:
                self._set(name, held[name])

    def of(self, item: Any) -> Part:
        made = Names(item, self.label)
        made.names, made._first, made._old = self.names, self._first, self._old
        return made

    def _set(self, name: str, value: Any) -> None:
        if isinstance(self.item, dict):
            self.item[name] = value
        else:
            setattr(self.item, name, value)

    def _delete(self, name: str) -> None:
        if isinstance(self.item, dict):
            del self.item[name]
        else:
            delattr(self.item, name)


class SlottedParts(Named):
    """Of an object whose classes have `__slots__`."""

    def read(self) -> Mapping[Any, Any]:
        held = {name: getattr(self.item, name, MISSING) for name in slots_of(type(self.item))}
        return {name: value for name, value in held.items() if value is not MISSING}

    def put(self, held: Mapping[Any, Any]) -> None:
        now = self.read()
        for name in now.keys() - held.keys():
            delattr(self.item, name)
        for name, value in held.items():
            if now.get(name, MISSING) is not value:
                object.__setattr__(self.item, name, value)


class Elements(Part):
    """Of a list or deque."""

    def read(self) -> Mapping[Any, Any]:
        return dict(enumerate(self.item))

    def put(self, held: Mapping[Any, Any]) -> None:
        self.item.clear()
        self.item.extend(held.values())


class Members(Part):
    """Of a set."""

    def read(self) -> Mapping[Any, Any]:
        return {entry: entry for entry in sorted(self.item, key=hash)}

    def put(self, held: Mapping[Any, Any]) -> None:
        self.item.clear()
        self.item.update(held)

    def name(self, key: Any) -> str:
        return f"{self.label} ({_text(key)})"


class Cell(Single):
    """A variable of an enclosing function."""

    def read(self) -> Mapping[Any, Any]:
        try:
            return {0: self.item.cell_contents}
        except ValueError:  # not filled yet
            return {0: _EMPTY}

    def put(self, held: Mapping[Any, Any]) -> None:
        if held[0] is _EMPTY:
            del self.item.cell_contents
        else:
            self.item.cell_contents = held[0]


class Context(Cell):
    """A context variable."""

    def read(self) -> Mapping[Any, Any]:
        return {0: self.item.get(_EMPTY)}

    def put(self, held: Mapping[Any, Any]) -> None:
        if held[0] is not _EMPTY:
            self.item.set(held[0])


class Bytes(Single):
    """Of a bytearray or NumPy array."""

    def read(self) -> Mapping[Any, Any]:
        if isinstance(self.item, bytearray):
            return {0: bytes(self.item)}
        held = np.asarray(self.item)  # of a masked array too
        return {0: str((held.shape, held.dtype)).encode() + held.tobytes()}

    def put(self, held: Mapping[Any, Any]) -> None:
        if self.read()[0] == held[0]:
            return
        if isinstance(self.item, bytearray):
            self.item[:] = held[0]
        else:
            before = np.frombuffer(held[0][-self.item.nbytes :], self.item.dtype)
            np.asarray(self.item)[...] = before.reshape(self.item.shape)


class TensorContents(Single):
    """Of a tensor."""

    def read(self) -> Mapping[Any, Any]:
        return {"contents": self.item.detach().clone()}

    def put(self, held: Mapping[Any, Any]) -> None:
        with torch.no_grad():
            self.item.detach().copy_(held["contents"])


class Objects(Part):
    """Of a NumPy array of objects."""

    def read(self) -> Mapping[Any, Any]:
        return dict(enumerate(self.item.flat))

    def put(self, held: Mapping[Any, Any]) -> None:
        for place, value in held.items():
            self.item.flat[place] = value


class Hidden(Single):
    """What an object of a library does not show."""

    def read(self) -> Mapping[Any, Any]:
        return {0: hidden_state(self.item)}

    def put(self, held: Mapping[Any, Any]) -> None:
        if self.read()[0] != held[0]:
            put_hidden_state(self.item, held[0])


class Defaults(Named):
    """What a function was made with."""

    def read(self) -> Mapping[Any, Any]:
        item = self.item
        return {"__code__": item.__code__, "__defaults__": item.__defaults__, "__kwdefaults__": item.__kwdefaults__}

    def put(self, held: Mapping[Any, Any]) -> None:
        for name, value in held.items():
            setattr(self.item, name, value)


class Position(Part):
    """How far an iterator or generator has gone, which cannot be put back."""

    def read(self) -> Mapping[Any, Any]:
        frame: Any = getattr(self.item, "gi_frame", MISSING)
        if frame is MISSING:
            return {0: repr(self.item.__reduce__()) if _reduces(self.item) else "unknown"}
        return {0: -1 if frame is None else frame.f_lasti, 1: "" if frame is None else repr(frame.f_locals)}

    def put(self, held: Mapping[Any, Any]) -> None:
        pass

    def name(self, key: Any) -> str:
        return f"the iterator {self.label}"


def _reduces(item: Any) -> bool:
    return type(item).__module__ in ("builtins", "itertools") and not isinstance(item, types.GeneratorType)


_PLAIN: Mapping[type, type[Part]] = {
    dict: Entries,
    OrderedDict: Entries,
    list: Elements,
    deque: Elements,
    set: Members,
}


def parts_of(item: Any, label: str) -> list[Part]:
    """All parts of an object but those of its class; none of what cannot change or cannot be looked into."""
    if isinstance(item, types.CellType):
        return [Cell(item, label)]
    if isinstance(item, types.FunctionType):
        return [Defaults(item, label), Attributes(vars(item), label)]
    if isinstance(item, ContextVar):
        return [Context(item, label)]
    if (whole := _PLAIN.get(type(item))) is not None:
        return [whole(item, label)]
    found: list[Part] = []
    if isinstance(item, (bytearray, np.ndarray)):
        found.append(Objects(item, label) if getattr(item, "dtype", None) == np.dtype(object) else Bytes(item, label))
    if hides(item):
        found.append(Hidden(item, label))
    for kind, part in ((dict, Entries), (list, Elements), (deque, Elements), (set, Members)):
        if isinstance(item, kind):
            found.append(part(item, label))
    if type(item) is not OrderedDict and isinstance(getattr(item, "__dict__", None), dict):
        found.append(Attributes(vars(item), label))
    if slots_of(type(item)):
        found.append(SlottedParts(item, label))
    if not found and hasattr(type(item), "__next__"):
        found.append(Position(item, label))
    return found


def slots_of(kind: type) -> list[str]:
    """The names in `__slots__` of a class and those that it comes from."""
    names: list[str] = []
    for base in kind.__mro__:
        given: Any = base.__dict__.get("__slots__", ())
        mangled = f"_{base.__name__.lstrip('_')}"
        for name in (given,) if isinstance(given, str) else given:
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"{mangled}{name}" if private else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def alike(now: Any, before: Any) -> bool:
    """Whether an entry is as it was: the same object, or an equal number, text or the like."""
    if now is before:
        return True
    if type(now) is not type(before) or not is_atom(now):
        return False
    if now == before:
        return bool(now) or str(now) == str(before)  # of zeros the sign too
    return bool(now != now and before != before)


def same_entries(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Whether all entries are as they were, in the same order."""
    return (
        len(now) == len(before)
        and all(map(_is_same_key, now, before))
        and all(map(alike, now.values(), before.values()))
    )


def _is_same_key(now: Any, before: Any) -> bool:
    return now is before or (not isinstance(now, torch.Tensor) and bool(now == before))


def inner(item: Any) -> Iterable[tuple[str, Any]]:
    """What an object that cannot change refers to, with a word on how."""
    if isinstance(item, (tuple, frozenset)):
        return ((f"[{index}]", entry) for index, entry in enumerate(item))
    if isinstance(item, types.MethodType):
        return (("", item.__func__), ("", item.__self__))
    if isinstance(item, (staticmethod, classmethod)):
        return (("", item.__func__),)
    if isinstance(item, property):
        return (("", one) for one in (item.fget, item.fset) if one is not None)
    if isinstance(item, BaseException):
        return (("", item.args),)
    if isinstance(item, types.MappingProxyType):
        return (("", held) for held in gc.get_referents(item))
    if isinstance(item, (types.BuiltinMethodType, types.MethodWrapperType)):
        owner = item.__self__
        holds = isinstance(owner, (torch.Tensor, *_HOLDERS)) or hasattr(owner, "__next__")
        return (("", owner),) if hides(owner) or (holds and not isinstance(owner, HIDING)) else ()
    return ()


def is_library(module: str | None) -> bool:
    """Whether a Python module is not looked into."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_atom(item: Any) -> bool:
    """Whether an object is nothing but its value: a number or text, which can have no attributes of its own."""
    return isinstance(item, ATOMS) and not hasattr(item, "__dict__")


def is_opaque(kind: type) -> bool:
    """Whether instances of a class are not looked into: some of libraries, unless they hold what others put there."""
    module = kind.__module__ or ""
    if not is_library(module) or issubclass(kind, _HOLDERS) or hasattr(kind, "__next__"):
        return False
    package = module.partition(".")[0]
    return package in _OF_THE_PROCESS or (package == "torch" and not module.startswith(_OF_MODELS))


def _text(key: Any) -> str:
    return "a tensor of the trace" if is_fake(key) else repr(key)

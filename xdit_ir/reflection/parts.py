"""Python objects as what can be read of them and put back: attributes, entries, elements, cells, bytes."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from xdit_ir.reflection.fakes import is_fake
from xdit_ir.reflection.hidden_state import hidden_state, hides, put_hidden_state
from xdit_ir.reflection.looked_into import is_library

MISSING = object()
_IMPORTED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
_EMPTY = object()
_DESCRIPTORS = (types.GetSetDescriptorType, types.MemberDescriptorType)


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

    def get(self) -> Any:
        """The entry."""
        raise NotImplementedError

    def set(self, value: Any) -> None:
        """Put another in its place."""
        raise NotImplementedError

    def read(self) -> Mapping[Any, Any]:
        return {"contents": self.get()}

    def put(self, held: Mapping[Any, Any]) -> None:
        self.set(held["contents"])

    def name(self, key: Any) -> str:
        return self.label


class Named(Part):
    """Contents by names that are those of attributes; what is put back is only what has changed."""

    def put(self, held: Mapping[Any, Any]) -> None:
        now = self.read()
        for name in now.keys() - held.keys():
            self._delete(name)
        for name, value in held.items():
            if now.get(name, MISSING) is not value:
                self._set(name, value)

    def name(self, key: Any) -> str:
        return f"{self.label}.{key}"

    def _set(self, name: str, value: Any) -> None:
        setattr(self.item, name, value)

    def _delete(self, name: str) -> None:
        delattr(self.item, name)


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
    """Of a module, object or function: `item` is its `__dict__`; or those parameters, buffers or submodules of a module
    that are called as its attributes."""

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

    def of(self, item: Any) -> Part:
        made = Names(item, self.label)
        made.names, made._first, made._old = self.names, self._first, self._old
        return made

    def _set(self, name: str, value: Any) -> None:
        if isinstance(self.item, dict):
            self.item[name] = value
        else:
            super()._set(name, value)

    def _delete(self, name: str) -> None:
        if isinstance(self.item, dict):
            del self.item[name]
        else:
            super()._delete(name)


class SlottedParts(Named):
    """Of an object whose classes have `__slots__`."""

    def read(self) -> Mapping[Any, Any]:
        names = slots_of(type(self.item))
        reads: Any = type(self.item).__getattribute__
        if reads is object.__getattribute__:
            held = {name: getattr(self.item, name, MISSING) for name in names}
        else:
            held = {name: _own(self.item, name) for name in names}
        return {name: value for name, value in held.items() if value is not MISSING}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self.item, name, value)  # of frozen objects too


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

    def get(self) -> Any:
        try:
            return self.item.cell_contents
        except ValueError:  # not filled yet
            return _EMPTY

    def set(self, value: Any) -> None:
        if value is _EMPTY:
            del self.item.cell_contents
        else:
            self.item.cell_contents = value


class Context(Single):
    """A context variable."""

    def get(self) -> Any:
        return self.item.get(_EMPTY)

    def set(self, value: Any) -> None:
        if value is not _EMPTY:
            self.item.set(value)


class Bytes(Single):
    """Of a bytearray or NumPy array."""

    def get(self) -> bytes:
        if isinstance(self.item, bytearray):
            return bytes(self.item)
        held = np.asarray(self.item)  # of a masked array too
        return str((held.shape, held.dtype)).encode() + held.tobytes()

    def set(self, value: bytes) -> None:
        if self.get() == value:
            return
        if isinstance(self.item, bytearray):
            self.item[:] = value
        else:
            before = np.frombuffer(value[-self.item.nbytes :], self.item.dtype)
            np.asarray(self.item)[...] = before.reshape(self.item.shape)


class TensorContents(Single):
    """Of a tensor."""

    def get(self) -> torch.Tensor:
        return self.item.detach().clone()  # type: ignore[no-any-return]

    def set(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.item.detach().copy_(value)


class Hidden(Single):
    """What an object of a library does not show."""

    def get(self) -> Any:
        return hidden_state(self.item)

    def set(self, value: Any) -> None:
        if self.get() != value:
            put_hidden_state(self.item, value)


class Objects(Part):
    """Of a NumPy array of objects."""

    def read(self) -> Mapping[Any, Any]:
        return dict(enumerate(self.item.flat))

    def put(self, held: Mapping[Any, Any]) -> None:
        for place, value in held.items():
            self.item.flat[place] = value


class Defaults(Named):
    """What a function was made with."""

    def read(self) -> Mapping[Any, Any]:
        item = self.item
        return {"__code__": item.__code__, "__defaults__": item.__defaults__, "__kwdefaults__": item.__kwdefaults__}


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


_CONTAINERS: Mapping[type, type[Part]] = {dict: Entries, list: Elements, deque: Elements, set: Members}
WHOLE: Mapping[type, type[Part]] = {**_CONTAINERS, OrderedDict: Entries}
"""Classes of which all that instances hold is one part."""


def parts_of(item: Any, label: str) -> list[Part]:
    """All parts of an object but those of its class; none of what cannot change or cannot be looked into."""
    if isinstance(item, types.CellType):
        return [Cell(item, label)]
    if isinstance(item, types.FunctionType):
        return [Defaults(item, label), Attributes(vars(item), label)]
    if isinstance(item, ContextVar):
        return [Context(item, label)]
    if (whole := WHOLE.get(type(item))) is not None:
        return [whole(item, label)]
    found: list[Part] = []
    if isinstance(item, (bytearray, np.ndarray)):
        found.append(Objects(item, label) if getattr(item, "dtype", None) == np.dtype(object) else Bytes(item, label))
    if hides(item):
        found.append(Hidden(item, label))
    found += [part(item, label) for kind, part in _CONTAINERS.items() if isinstance(item, kind)]
    if type(item) is not OrderedDict and (held := attributes_of(item)) is not None:
        found.append(Attributes(held, label))
    if slots_of(type(item)):
        found.append(SlottedParts(item, label))
    if not found and hasattr(type(item), "__next__"):
        found.append(Position(item, label))
    return found


def _own(item: Any, name: str) -> Any:
    try:
        return object.__getattribute__(item, name)
    except AttributeError:
        return MISSING


def attributes_of(item: Any) -> dict[str, Any] | None:
    """The `__dict__` of an object, also where its class gives another one for it, or none."""
    given = (base.__dict__["__dict__"] for base in reversed(type(item).__mro__) if "__dict__" in base.__dict__)
    own = next((one for one in given if isinstance(one, _DESCRIPTORS)), None)
    held = getattr(item, "__dict__", None) if own is None else own.__get__(item)
    return held if isinstance(held, dict) else None


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


def _text(key: Any) -> str:
    return "a tensor of the trace" if is_fake(key) else repr(key)

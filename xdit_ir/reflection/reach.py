"""Everything in Python that forward may read or write: what a model's objects and code refer to."""

from __future__ import annotations

import functools
import os
import threading
import types
import weakref
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from xdit_ir.reflection.atoms import VALUES, is_atom
from xdit_ir.reflection.global_hooks import GLOBAL_HOOKS, GlobalHooks, foreign_hooks
from xdit_ir.reflection.looked_into import inner, is_library, is_opaque
from xdit_ir.reflection.methods import StandIn
from xdit_ir.reflection.names import imported_in, is_installed, is_operator, names_in, package_of, words_in
from xdit_ir.reflection.parts import WHOLE, Attributes, Names, Part, parts_of

_CACHED = type(functools.lru_cache(lambda: None))
_OURS = "_xdit_"  # what a module that stands in for another keeps: of it only that other matters
_STATE = ("_parameters", "_buffers")
_READ = (*_STATE, "_modules", "_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set")
# Of every module, and of no meaning to forward: hooks of state_dict and backward, and which hooks take what.
BESIDE = frozenset(name for name, item in vars(nn.Module()).items() if isinstance(item, dict) and name not in _READ)
_APART = BESIDE | {"_modules"}
_ENVIRONMENT = frozenset({"environ", "getenv"})
_BY_TEXT = frozenset({"globals", "eval", "exec"})  # what finds globals by names in texts


class _Methods(Names):
    """Of tensors, those that code names: also such as somebody puts there later."""

    def read(self) -> Mapping[Any, Any]:
        return {name: self.held[name] for name in self.names if name in self.held}


class Reach:
    """The `parts` of all objects reached from some roots, and the `tensors` there, which are no state of a module.

    Followed are attributes, containers, closures, arguments of partials, and, as far as the names in code say, globals,
    classes and Python modules of the packages that the model and its hooks come from, and of those that are not
    installed (`config.py` beside `model.py`). What other packages keep is theirs, and may be changed by others at any
    time. The standard library, torch and numpy are not looked into; the
    names that code uses of them are in `library`. Entries `unread`, by the id of the dict that holds them, are not
    followed.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]], unread: Set[tuple[int, Any]] = frozenset()) -> None:
        self.parts: list[Part] = []
        self.library: list[Names] = []
        self.modules: list[tuple[str, nn.Module]] = []
        self.objects: list[Any] = []  # of classes that are looked into
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.caches: list[Any] = []  # functions with an `lru_cache`
        self._seen: dict[int, Any] = {}
        self._unread = unread
        self._known: set[str] = set()
        self._spaces: dict[str, list[tuple[Names, bool]]] = {}
        self._globals: dict[int, Names] = {}
        self._waiting: list[tuple[str, Any, bool]] = []
        self._homes = {"builtins", "collections"}
        self._methods = _Methods(torch.Tensor, "torch.Tensor")
        self.library.append(self._methods)
        self._push(roots)
        for name in GLOBAL_HOOKS:
            self.parts.append(GlobalHooks(name, f"the global hooks {name}"))
            self._push((f"the global hooks {name}", hook) for hook in foreign_hooks(name).values())
        while self._waiting:
            self._visit(*self._waiting.pop())

    @property
    def code(self) -> list[tuple[str, Any]]:
        """Classes, functions and Python modules."""
        kinds = (type, types.FunctionType, types.ModuleType)
        return [(item.__name__, item) for item in self._seen.values() if isinstance(item, kinds)]

    def _visit(self, label: str, item: Any, named: bool) -> None:
        """`named`: it was found by its name in code."""
        if type(item) in WHOLE:
            return self._whole(label, item)
        if is_atom(item) or id(item) in self._seen:
            return
        package = package_of(item)
        if named and package not in self._homes and not is_library(package) and is_installed(package):
            return
        if not named:
            self._homes.add(package)
        self._seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            self.tensors.append((label, item))
        elif isinstance(item, type):
            self._space(item, item.__qualname__, is_library(item.__module__))
            self._push(((base.__qualname__, base) for base in (*item.__mro__[1:], type(item))), named=True)
        elif isinstance(item, types.ModuleType):
            self._space(item, item.__name__, is_library(item.__name__))
        elif isinstance(item, nn.Module):
            self._module(label, item)
        elif isinstance(item, StandIn):
            self._push([(label, item.original)])
        elif isinstance(item, types.FunctionType):
            self._function(label, item)
        elif isinstance(item, functools.partial):
            self._push((label, part) for part in (item.func, *item.args, item.keywords))
        elif isinstance(item, _CACHED):
            self.caches.append(item)
            self._push([(label, item.__wrapped__)])
        elif isinstance(item, weakref.ReferenceType):
            self._push([(label, item())])
        else:
            self._object(label, item)

    def _push(self, items: Iterable[tuple[str, Any]], named: bool = False) -> None:
        self._waiting += [(label, item, named) for label, item in items if type(item) not in VALUES]

    def _whole(self, label: str, item: Any) -> None:
        """A list, dict or set: most are empty, as those for hooks."""
        if id(item) not in self._seen:
            self._seen[id(item)] = item
            part = WHOLE[type(item)](item, label)
            if item:
                self._part(part)
            else:
                self.parts.append(part)

    def _part(self, part: Part) -> None:
        self.parts.append(part)
        pairs = (pair for pair in part.read().items() if (id(part.item), pair[0]) not in self._unread)
        self._push((part.name(pair[0]), entry) for pair in pairs for entry in pair if type(entry) not in VALUES)

    def _object(self, label: str, item: Any) -> None:
        self._push((f"{label}{how}", entry) for how, entry in inner(item))
        kind = type(item)
        if is_opaque(kind):
            return
        for part in parts_of(item, label):
            self._part(part)
        if not is_library(kind.__module__):
            self._classes(kind)
        if not is_library(kind.__module__) or isinstance(item, threading.local):  # of each thread another `__dict__`
            self.objects.append(item)

    def _module(self, label: str, module: nn.Module) -> None:
        self.modules.append((label, module))
        held = vars(module)
        self.parts.append(Attributes(held, label))
        for name in _STATE:
            self._seen[id(held[name])] = held[name]
            self.parts.append(Attributes(held[name], label))
            self._seen.update((id(tensor), tensor) for tensor in dict.values(held[name]))
        self._classes(type(module))
        submodules = held["_modules"]
        self._seen[id(submodules)] = submodules
        self.parts.append(Attributes(submodules, label))
        own = [(name, entry) for name, entry in held.items() if type(entry) not in VALUES and name not in _APART]
        own = [(name, entry) for name, entry in own if (id(held), name) not in self._unread]
        own = [(name, entry) for name, entry in own if not name.startswith(_OURS) or name == f"{_OURS}original"]
        self._push((f"{label}.{name}" if label else name, entry) for name, entry in (*own, *submodules.items()))

    def _classes(self, kind: type) -> None:
        self._push((base.__qualname__, base) for base in kind.__mro__ if base is not object)

    def _function(self, label: str, function: types.FunctionType) -> None:
        self.parts.extend(parts_of(function, label))
        self._push((label, entry) for entry in (*(function.__defaults__ or ()), function.__kwdefaults__))
        self._push((f"{label}.{name}", entry) for name, entry in vars(function).items())
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            where = f"{name} in the closure of {function.__qualname__}"
            for part in parts_of(cell, where):
                if id(cell) not in self._seen:
                    self._seen[id(cell)] = cell
                    self.parts.append(part)
                    self._push((where, entry) for entry in part.read().values() if not isinstance(entry, Part))
        home = function.__globals__
        if not is_library(str(home.get("__name__"))):
            names, words = list(names_in(function.__code__)), list(words_in(function.__code__))
            self._know((*names, *words))
            self._used(home, names if _BY_TEXT.isdisjoint(names) else (*names, *words))
            self._push(((module.__name__, module) for module in imported_in(function)), named=True)
            if not _ENVIRONMENT.isdisjoint(names):
                self._environment([*function.__code__.co_consts, *(home.get(name) for name in names)])

    def _environment(self, texts: Iterable[Any]) -> None:
        """Variables of the environment: those that code names, and all that there are."""
        part = Names(getattr(os.environ, "_data", {}), "os.environ")
        named = {name for name in texts if isinstance(name, str) and "\0" not in name}
        for name in sorted(named | {*os.environ}):
            part.note(os.environ.encodekey(name))
        self.parts.append(part)

    def _used(self, home: dict[str, Any], names: Iterable[str]) -> None:
        """Names that code uses of its globals."""
        space = self._globals.get(id(home))
        if space is None:
            space = self._globals[id(home)] = Names(home, str(home.get("__name__")))
            self.parts.append(space)
        known = set(space.names)
        for name in names:
            if name not in known and not name.startswith("__") and name.isidentifier():
                known.add(name)
                space.note(name)
                if name in home:
                    self._push([(space.name(name), home[name])], named=True)

    def _space(self, item: Any, label: str, opaque: bool) -> None:
        """A class or Python module, of which the names matter that code uses anywhere."""
        space = Names(item, label)
        (self.library if opaque else self.parts).append(space)
        held = vars(item)
        named = isinstance(item, types.ModuleType)
        for name in list(held):
            self._spaces.setdefault(name, []).append((space, opaque))
            ours = not named and not opaque and (is_operator(name) or (type(held[name]) in VALUES and name[:2] != "__"))
            if ours or name in self._known or name == "forward":
                self._note(space, opaque, name)

    def _know(self, names: Iterable[str]) -> None:
        new = set(names) - self._known
        self._known |= new
        for name in new:
            if hasattr(torch.Tensor, name):
                self._methods.note(name)
            for space, opaque in self._spaces.get(name, ()):
                if name not in space.names and name in vars(space.item):
                    self._note(space, opaque, name)

    def _note(self, space: Names, opaque: bool, name: str) -> None:
        space.note(name)
        entry = vars(space.item)[name]
        if not opaque or isinstance(entry, types.ModuleType):  # as `functional` of `nn.functional.gelu`
            self._push([(space.name(name), entry)], named=True)

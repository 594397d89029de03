"""A copy of a module tree that shares no mutable state with it and holds fake tensors for weights."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import Origin
from xdit_ir.errors import StateError
from xdit_ir.ir.wrappers import is_dressed
from xdit_ir.reflection.atoms import ATOMS, VALUES, is_plain_object
from xdit_ir.reflection.methods import StandIn
from xdit_ir.reflection.parts import attributes_of

MakeState = Callable[[list[str], torch.Tensor, Origin], torch.Tensor]
Dress = Callable[[torch.Tensor, type, dict[str, Any]], torch.Tensor]
_SHARED = (*ATOMS, type, types.FunctionType)  # with the original
_DICTS = (dict, OrderedDict, defaultdict)
_EMPTIED = frozenset({dict, OrderedDict})
_SKIPPED = ("_parameters", "_buffers", "_modules")
_COMPILED = "_compiled_call_impl"  # of module.compile(): bound to the original
_DEPTH = 3


def _undressed(fake: torch.Tensor, kind: type, held: dict[str, Any]) -> torch.Tensor:
    return fake


class LazyState(dict[str, Any]):
    """A module's parameters or buffers: the real ones, given out as fakes, which are made when first asked for."""

    def __init__(self, raw: Mapping[str, Any], fake_of: Callable[[Any], Any]) -> None:
        super().__init__(raw)
        self._fake_of = fake_of

    def __getitem__(self, key: str) -> Any:
        return self._fake_of(super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[key] if dict.__contains__(self, key) else default

    def values(self) -> Any:
        """As of a dict."""
        return [self[key] for key in self]

    def items(self) -> Any:
        """As of a dict."""
        return [(key, self[key]) for key in self]


class _Still:
    """Stands for an iterator, which cannot be copied and would be a step further after the trace."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise StateError(f"{source_line()}: forward keeps a state between calls: how far a {self._kind} has gone")


class Skeleton:
    """The copy: `model`, the copies of all `modules` by path, and all paths of each copy by its id.

    `functions` take, by the id of the other, the place of functions in attributes.
    """

    def __init__(
        self,
        model: nn.Module,
        make_state: MakeState,
        functions: Mapping[int, Callable[..., Any]] | None = None,
        dress: Dress = _undressed,
    ) -> None:
        self._copies: dict[int, Any] = {}
        self._functions = functions or {}
        self._originals: list[Any] = []
        self._pairs: dict[int, Any] = {}  # of as many originals as are `_paired`
        self._paired = 0
        self._make_state, self._dress = make_state, dress
        everything = list(model.named_modules(remove_duplicate=False))
        self._names, self._registered = _state_names(everything)
        self.model = self._module(model)
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[int, list[str]] = {}
        for path, module in everything:
            copy = self._module(module)
            if id(copy) not in self.aliases:
                self.modules[path] = copy
            self.aliases.setdefault(id(copy), []).append(path)

    def copy_of(self, item: Any) -> Any:
        """A copy of an object that may refer to the model; unknown kinds of objects are themselves."""
        return self._copy(item)

    def let_go(self) -> None:
        """Take apart what refers to itself, once the trace is done: thousands of modules, for which Python's garbage
        collector would otherwise look through everything."""
        for copy in self.modules.values():
            held = copy.__dict__
            for name in [name for name, item in held.items() if type(item) is types.FunctionType]:
                del held[name]
        del self.model, self.modules, self._copies, self._originals, self._pairs

    @property
    def originals(self) -> dict[int, Any]:
        """What was copied, by the id of its copy; fakes stand for tensors. What is its own copy is not there."""
        for item in self._originals[self._paired :]:
            copy = self._copies[id(item)]
            if copy is not item:
                self._pairs[id(copy)] = item
                if type(item) not in _EMPTIED and (held := attributes_of(item)) is not None:
                    self._pairs[id(attributes_of(copy))] = held
        self._paired = len(self._originals)
        return self._pairs

    @property
    def objects(self) -> list[Any]:
        """Plain objects that were copied, without modules and tensors."""
        found = [item for item in self._originals if type(item) not in _EMPTIED]
        found = [item for item in found if not isinstance(item, (nn.Module, torch.Tensor))]
        return [item for item in found if is_plain_object(type(item)) and self._copies[id(item)] is not item]

    def _remember(self, original: Any, copy: Any) -> None:
        self._copies[id(original)] = copy
        self._originals.append(original)

    def _module(self, module: nn.Module) -> nn.Module:
        found = self._copies.get(id(module))
        if found is not None:
            return found  # type: ignore[no-any-return]
        copy = module.__class__.__new__(module.__class__)
        self._remember(module, copy)
        held, copies, originals = copy.__dict__, self._copies, self._originals
        for name, item in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                held[name] = LazyState(item, self.state_of)
                self._remember(item, held[name])
            elif (kind := type(item)) in VALUES:
                held[name] = item
            elif kind in _EMPTIED and not item and id(item) not in copies:  # most hold no hooks
                held[name] = copies[id(item)] = kind()  # as `_remember` does
                originals.append(item)
            elif name != _COMPILED:
                held[name] = self._copy(item)
        if "_orig_mod" in module._modules and "dynamo_ctx" in module.__dict__:
            copy.__dict__["forward"] = copy._modules["_orig_mod"]  # torch.compile(module): what it wraps
        return copy

    def state_of(self, tensor: Any) -> Any:
        """The fake for a parameter or buffer of the model; anything else is itself."""
        return self._state(tensor) if id(tensor) in self._registered else tensor

    def _state(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._copies:
            origin = Origin.PARAMETER if isinstance(tensor, nn.Parameter) else Origin.BUFFER
            fake = self._make_state(self._names[id(tensor)], tensor, origin)
            if is_dressed(tensor):
                fake = self._dress(fake, type(tensor), {name: self._copy(held) for name, held in vars(tensor).items()})
            if origin is Origin.PARAMETER:
                fake._is_param = True
            self._remember(tensor, fake)
        found: torch.Tensor = self._copies[id(tensor)]
        return found

    def _copy(self, item: Any) -> Any:
        if id(item) in self._functions:
            return self._functions[id(item)]
        if isinstance(item, _SHARED):
            return item
        if isinstance(item, nn.Module):
            return self._module(item)
        if isinstance(item, StandIn):
            return self._copy(item.original)
        if isinstance(item, torch.Tensor):
            return self._attribute(item)
        if id(item) in self._copies:
            return self._copies[id(item)]
        return self._container(item)

    def _attribute(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in a plain attribute: state if it is registered or has no contents, else a constant."""
        if id(tensor) in self._copies:
            return self._copies[id(tensor)]  # type: ignore[no-any-return]
        if id(tensor) in self._registered or (tensor.device.type == "meta" and id(tensor) in self._names):
            return self._state(tensor)
        fake = self._make_state(self._names.get(id(tensor), ["held"]), tensor, Origin.CONSTANT)
        self._remember(tensor, fake)
        return fake

    def _container(self, item: Any) -> Any:
        kind = type(item)
        if isinstance(item, types.MethodType):
            return types.MethodType(item.__func__, self._copy(item.__self__))
        if kind is functools.partial:
            keywords = {key: self._copy(entry) for key, entry in item.keywords.items()}
            return functools.partial(self._copy(item.func), *map(self._copy, item.args), **keywords)
        if kind is tuple:
            return tuple(self._copy(entry) for entry in item)
        if kind is list:
            copy: Any = []
            self._remember(item, copy)
            copy.extend(self._copy(entry) for entry in item)
        elif kind is set:
            copy = set(item)
        elif hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            copy = _Still(kind.__name__)
        elif kind in _DICTS:
            copy = item.copy()
            self._remember(item, copy)
            copy.update({key: self._copy(entry) for key, entry in item.items()})
        elif is_plain_object(kind) and (held := attributes_of(item)) is not None:
            copy = object.__new__(kind)
            self._remember(item, copy)
            cast(dict[str, Any], attributes_of(copy)).update({name: self._copy(entry) for name, entry in held.items()})
        else:
            copy = item
        self._remember(item, copy)
        return copy


def watch(module: nn.Module, names: set[str], seen: Callable[[str], None]) -> None:
    """Make a copied module tell when one of these plain attributes is read; it need not have all of them itself."""

    def watched(name: str) -> property:
        def get(self: nn.Module) -> Any:
            seen(name)
            held = self.__dict__
            return held[name] if name in held else getattr(super(module.__class__, self), name)

        def put(self: nn.Module, item: Any) -> None:
            self.__dict__[name] = item

        return property(get, put)

    kind = type(module)
    members = {name: watched(name) for name in names}
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_watched_class": kind}
    module.__class__ = type(kind.__name__, (kind,), {**body, **members})


def _state_names(everything: Sequence[tuple[str, nn.Module]]) -> tuple[dict[int, list[str]], set[int]]:
    """All qualified names of every tensor of a model's modules, by identity; identities of parameters and buffers.

    A tensor in a list or dict is named by its place: `rope.tables.0`.
    """
    names: dict[int, list[str]] = {}

    def add(path: str, held: Any, depth: int) -> None:
        if isinstance(held, torch.Tensor):
            names.setdefault(id(held), []).append(path)
        elif depth and type(held) in (dict, list, tuple):
            for name, item in held.items() if type(held) is dict else enumerate(held):
                if isinstance(name, (str, int)):
                    add(f"{path}.{name}" if path else str(name), item, depth - 1)

    for path, module in everything:
        add(path, module.__dict__["_parameters"], 1)
        add(path, module.__dict__["_buffers"], 1)
    registered = set(names)
    for path, module in everything:
        own = [(name, item) for name, item in module.__dict__.items() if type(item) not in VALUES]
        own = [(name, item) for name, item in own if not (type(item) in _EMPTIED and not item)]
        add(path, {name: item for name, item in own if name not in _SKIPPED}, _DEPTH)
    return names, registered

"""Which objects are looked into for what may change: those of models, and of libraries those that hold what others put
there; and what is behind those that cannot change themselves."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import types
from collections import UserList, deque
from collections.abc import Iterable, MutableMapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_ir.reflection.hidden_state import HIDING, hides

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


def is_opaque(kind: type) -> bool:
    """Whether instances of a class are not looked into: some of libraries, unless they hold what others put there."""
    module = kind.__module__ or ""
    if not is_library(module) or issubclass(kind, _HOLDERS) or hasattr(kind, "__next__"):
        return False
    package = module.partition(".")[0]
    return package in _OF_THE_PROCESS or (package == "torch" and not module.startswith(_OF_MODELS))

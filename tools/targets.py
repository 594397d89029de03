"""What MODEL means on the command line: a name of the zoo, or a function that returns `(model, example)`."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir import models
from xdit_ir.capture.inputs import Example
from xdit_ir.errors import XditError

HELP = (
    "a name of the zoo (flux.1-dev, or flux.1-dev:tiny for a few narrow layers; see `xdit-ir models`), or "
    "package.module:function returning (model, example)"
)
SPEEDS = (
    "speeds of GPUs and links that choices are priced with, such as bytes=25e9 (default: those here; on CPUs an H100's)"
)
TRIM = "leave out hidden text, by multiples of N words"
MACHINE = "the machine: a name (h100, rtx4090, ...) or speeds of GPUs and links, such as bytes=25e9 (default: h100)"
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Target:
    """A model and the arguments of one forward."""

    name: str
    model: nn.Module
    example: Example

    def tensors(self) -> Iterator[torch.Tensor]:
        """Parameters, buffers and inputs."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from (leaf for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, torch.Tensor))

    def to(self, device: str) -> Target:
        """The target on a device."""
        moved = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), self.example)
        return replace(self, model=self.model.to(device), example=moved)


def is_full_size(text: str) -> bool:
    """Whether `text` names a model of the zoo in its published size."""
    return text in models.names() and models.entry(text).full is not None


def resolve(text: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Target:
    """Find MODEL. `device` and `dtype` are for the zoo; a function decides for itself.

    Raises:
        XditError: there is no such model or function, or it does not return `(model, example)`.
    """
    try:
        torch.device(device)
    except RuntimeError:
        raise XditError(f"--device {device}: expected one that PyTorch has, such as meta, cpu or cuda") from None
    in_zoo = text.partition(":")[0] in models.names()
    if not in_zoo and FUNCTION.fullmatch(text):
        return _called(text, _function(text))
    try:
        model, example = models.load(text, device=device, dtype=dtype)
    except models.UnknownModelError as error:
        raise XditError(f"{error}; or give package.module:function returning (model, example)") from None
    except (LookupError, ImportError) as error:
        raise XditError(f"{text} cannot be loaded: {error}") from error
    return Target(text, model, example)


def _function(text: str) -> Callable[[], Any]:
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(f"importing {module}", error) from error
        raise XditError(
            f"there is no module {error.name!r} here or among the installed packages, and {text!r} is not in "
            "the zoo either (see `xdit-ir models`)"
        ) from None
    except Exception as error:
        raise _failed(f"importing {module}", error) from error
    if not callable(found):
        raise XditError(f"module {module} has no function {name}; it should return (model, example)")
    return found  # type: ignore[no-any-return]


def _called(text: str, function: Callable[[], Any]) -> Target:
    try:
        result = function()
    except XditError:
        raise
    except Exception as error:
        raise _failed(f"{text}()", error) from error
    fits = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)
    if not fits or not isinstance(result[1], (dict, tuple)):
        raise XditError(
            f"{text}() should return (model, example): an nn.Module, and a dict of keyword arguments or a "
            f"tuple of positional ones; it returned {type(result).__name__}"
        )
    return Target(text, *result)


def _failed(doing: str, error: Exception) -> XditError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return XditError(f"{doing} raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})")

"""Tensors of classes that add Python to plain ones, as weights of packed bytes that know their format: while they are
traced, fakes of the same class, whose operators are those of the plain fakes below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from xdit_ir.capture.recorder import Recorder
from xdit_ir.reflection.fakes import is_fake

_MAKE: Any = torch.Tensor._make_subclass


def dressed(recorder: Recorder, fake: torch.Tensor, kind: type, held: dict[str, Any] | None = None) -> torch.Tensor:
    """Another fake for the same value, of this class and with these attributes."""
    with recorder.recording(False):
        twin = recorder.twin(fake)
    twin.__class__ = _fake_class(kind)
    vars(twin).update(held or {})
    return twin


@contextmanager
def dressing(recorder: Recorder) -> Iterator[None]:
    """While forward runs, fakes are given classes by what gives them to tensors."""
    kinds: Any = torch.Tensor

    def make(kind: type, data: torch.Tensor, requires_grad: bool = False, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not is_fake(data):
            made: torch.Tensor = _MAKE(kind, data, requires_grad, *args, **kwargs)
            return made
        return as_class(recorder, data, kind)

    kinds._make_subclass = staticmethod(make)
    try:
        yield
    finally:
        del kinds._make_subclass


def as_class(recorder: Recorder, fake: torch.Tensor, kind: type) -> torch.Tensor:
    """A fake as a tensor of a class: of `torch.Tensor`, the plain one below."""
    plain = recorder.value(fake).fake
    return plain if kind in (torch.Tensor, FakeTensor) else dressed(recorder, plain, kind)


@lru_cache(maxsize=64)
def _fake_class(kind: type) -> type:
    if issubclass(kind, FakeTensor):
        return kind
    body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    build: Callable[..., type] = type(kind)
    return build(kind.__name__, (kind, FakeTensor), body)

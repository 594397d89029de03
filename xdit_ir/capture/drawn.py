"""Random numbers lie in memory in the order in which they are drawn, so how a tensor for them lies is written down."""

from __future__ import annotations

from typing import Any

import torch

from xdit_ir.capture.operators import aten
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.source import source_line
from xdit_ir.capture.values import spec_of
from xdit_ir.reflection.fakes import device_of

_INTO = frozenset(
    getattr(aten, f"{name}_")
    for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random", "uniform")
)


def placed(recorder: Recorder, func: Any, args: tuple[Any, ...], result: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of an operator that draws `result`. Instead of a tensor whose contents it does not use, as of
    `randn_like`, it gets an empty one that lies as the result does in the model: a program's may lie otherwise."""
    likes = func._schema.name.endswith("_like") and isinstance(args[0], torch.Tensor)
    return _formed(recorder, args, result) if likes else args


def drawn_into(
    recorder: Recorder, func: Any, args: tuple[Any, ...], result: torch.Tensor, target: torch.Tensor
) -> tuple[Any, ...]:
    """The same for one that draws into `target`, and whose functional twin gives `result`."""
    if func.overloadpacket not in _INTO:
        return args
    if result.stride() != target.stride():
        raise recorder.opaque(f"{source_line()}: {func} would draw other numbers for a tensor that lies so in memory")
    return _formed(recorder, args, target)


def _formed(recorder: Recorder, args: tuple[Any, ...], like: torch.Tensor) -> tuple[Any, ...]:
    form = {"dtype": args[0].dtype, "device": device_of(args[0])}
    sizes = list(like.shape), list(like.stride())
    return (recorder.call(aten.empty_strided.default, sizes, form, spec_of(args[0])), *args[1:])

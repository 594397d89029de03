"""What forward asks PyTorch about the mode in which it is called: noted while tracing, as guards; and all settings of
PyTorch on which results depend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from xdit_ir.capture.source import is_torch, source_line
from xdit_ir.errors import TraceError
from xdit_ir.ir.guards import ASKED, Guard
from xdit_ir.ir.program import Program
from xdit_ir.reflection.looked_into import is_library
from xdit_ir.reflection.tree import modules_of

_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "initial_seed", "get_num_threads")
_SEEDS = ("manual_seed", "seed", "set_rng_state")
_SPACES = (torch, torch.random)
_C: Any = torch._C
# How PyTorch itself asks for its settings; the functions and attributes that it shows are ten times as slow.
_SETTINGS: tuple[Callable[[], Any], ...] = (
    *(partial(torch.is_autocast_enabled, kind) for kind in ("cpu", "cuda")),
    *(partial(torch.get_autocast_dtype, kind) for kind in ("cpu", "cuda")),
    *(_C._get_deterministic_algorithms, _C._get_deterministic_algorithms_warn_only),
    *(_C._get_deterministic_fill_uninitialized_memory, torch.is_anomaly_enabled, torch.get_default_dtype),
    *(
        partial(_C._get_fp32_precision_getter, *of)
        for of in (("cuda", "matmul"), ("cuda", "conv"), ("mkldnn", "matmul"))
    ),
    *(_C._get_cublas_allow_fp16_reduced_precision_reduction, _C._get_cublas_allow_bf16_reduced_precision_reduction),
    *(_C._get_flash_sdp_enabled, _C._get_mem_efficient_sdp_enabled, _C._get_math_sdp_enabled),
    *(_C._get_cudnn_sdp_enabled, _C._get_cudnn_enabled, _C._get_mkldnn_enabled),
)  # not the priority of kernels for attention, which PyTorch itself sets at the first one on a GPU


def torch_settings() -> tuple[Any, ...]:
    """Global settings that change what operators compute, or which kernels do, and that forward may read."""
    place = torch.get_default_device().type if _C._len_torch_function_stack() else "cpu"
    return (place, *(ask() for ask in _SETTINGS))


def _changed(before: tuple[Any, ...]) -> str:
    """What of the settings is no longer what it was, as `getter: old -> new`."""
    names = ("default device", *(getattr(ask, "__name__", str(ask)).removeprefix("_get_") for ask in _SETTINGS))
    rows = zip(names, before, torch_settings(), strict=True)
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in rows if old != new)


@contextmanager
def noted(asked: dict[str, tuple[Any, str]], model: nn.Module, *, as_called: bool) -> Iterator[None]:
    """Note what forward asks, and refuse that it seeds random numbers. It is told of the caller's mode if `as_called`,
    otherwise of none: programs are for inference. To be entered in the caller's mode, and a trace within."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    told = {"is_inference_mode_enabled": as_called and inference}
    functions: dict[int, Callable[..., Any]] = {}
    for name in _QUESTIONS:
        functions[id(getattr(torch, name))] = _asking(name, getattr(torch, name), asked, told)
    functions |= {id(getattr(torch, name)): _refusing(name, getattr(torch, name)) for name in _SEEDS}
    before = torch_settings()
    with ExitStack() as patches:
        for space in (*map(vars, _SPACES), *_globals(model)):
            found = {key: functions[id(item)] for key, item in list(space.items()) if id(item) in functions}
            if found:
                patches.enter_context(patch.dict(space, found))
        patches.enter_context(torch.inference_mode())
        with torch.set_grad_enabled(as_called and grad):
            yield
        if changed := _changed(before):
            raise TraceError(
                f"forward changes settings of PyTorch, which a program does not; set them before it ({changed})"
            )


def check_asked(program: Program) -> bool:
    """Whether what forward asked is as it was."""
    guards = (guard for guard in program.signature.guards if guard.path.startswith(ASKED))
    return all(getattr(torch, guard.path.removeprefix(ASKED))() == guard.value for guard in guards)


def asked_guards(asked: Mapping[str, tuple[Any, str]]) -> tuple[Guard, ...]:
    """What was noted."""
    return tuple(Guard(f"{ASKED}{name}", value, reason) for name, (value, reason) in asked.items())


def mode_refusal() -> TraceError | None:
    """Why a call cannot be made under a `TorchFunctionMode` of somebody's: functions of a program do not pass it."""
    modes = _get_current_function_mode_stack() if _C._len_torch_function_stack() else ()  # type: ignore[no-untyped-call]
    kinds = [type(mode) for mode in modes if not is_library(type(mode).__module__)]
    if not kinds:
        return None
    return TraceError(
        f"the call is under a TorchFunctionMode, {kinds[0].__qualname__}, which would not see the functions that "
        "forward calls; leave it for this call, or run the model that was ported"
    )


def _globals(model: nn.Module) -> list[dict[str, Any]]:
    """Those of the Python modules of the model's classes, which may have imported a function by its name."""
    names = {kind.__module__ for module in modules_of(model) for kind in type(module).__mro__}
    return [vars(sys.modules[name]) for name in names if name in sys.modules and name.partition(".")[0] != "torch"]


def _by_model() -> bool:
    """Whether it is not PyTorch's own code that calls our caller."""
    return not is_torch(sys._getframe(2).f_code.co_filename)


def _asking(name: str, real: Any, asked: dict[str, tuple[Any, str]], told: Mapping[str, Any]) -> Callable[[], Any]:
    def ask() -> Any:
        if not _by_model():
            return real()
        value = told[name] if name in told else real()
        asked.setdefault(name, (value, source_line()))
        return value

    return ask


def _refusing(name: str, real: Any) -> Callable[..., Any]:
    def seed(*args: Any, **kwargs: Any) -> Any:
        if _by_model():
            raise TraceError(
                f"{source_line()}: forward seeds random numbers ({name}), which a program would not do again; seed "
                "before it, or pass the noise"
            )
        return real(*args, **kwargs)

    return seed

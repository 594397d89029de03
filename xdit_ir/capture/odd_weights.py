"""Weights that a trace would misread: no plain tensors, or moved and cast by hooks around forward. Found by looking at
the modules only, before anything is run."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from xdit_ir.errors import TraceError
from xdit_ir.ir.wrappers import PLAIN, bare, parts_inside
from xdit_ir.reflection.atoms import VALUES
from xdit_ir.reflection.tree import named_modules_of

_WRAPPERS = (DataParallel, DistributedDataParallel)
Casts = dict[tuple[int, str], tuple[dict[str, Any], Any, torch.dtype]]
"""By holder and name: the dict that holds a weight, the weight before it was cast, and its dtype."""
_FSDP = "torch.distributed.fsdp"
_OTHERS = VALUES | {dict, OrderedDict, list, set}  # what is no tensor itself
# What the hooks do that diffusers keeps in these modules.
_HOOKS = {
    "diffusers.hooks.group_offloading": "offloads weights (enable_group_offload)",
    "diffusers.hooks.context_parallel": "divides the model already (enable_parallelism)",
    "diffusers.hooks.tensor_parallel": "divides the model already (enable_parallelism)",
}


def odd_weight(model: nn.Module) -> str | None:
    """What of a model's weights cannot be traced as it is, and what to do about it; None if there is nothing."""
    return next(_odd(model), None)


def odd_weight_tensor(name: str, tensor: torch.Tensor) -> str | None:
    """As `odd_tensor`, for a parameter or buffer, of which a trace sees what its class adds in Python."""
    return odd_tensor(name, bare(tensor))


def odd_tensor(name: str, tensor: torch.Tensor) -> str | None:
    """Why a tensor is not what its shape and dtype say; None if it is."""
    kind = type(tensor)
    if kind not in PLAIN:
        return (
            f"{name} is a {kind.__module__}.{kind.__qualname__}, which is no plain tensor: its operators are its own; "
            "give the model plain weights (dequantised, gathered, initialised)"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        how = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        return f"{name} is a {how} tensor; give the model plain (strided) weights"
    return None


def applied(path: str, module: nn.Module, casts: Casts) -> Callable[..., nn.Module]:
    """What `to` and the like do to a copied module while it is traced: weights are cast at every call, by operators, as
    long as forward runs, and noted in `casts`; moving them is refused. Cast back from a type that has all numbers of
    the one before, they are what they were."""

    def apply(fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for child in module.modules() if recurse else (module,):
            for holder in (child._parameters, child._buffers):
                held: dict[str, Any] = holder
                for name in [name for name in held if held[name] is not None]:
                    tensor: torch.Tensor = held[name]
                    made = fn(tensor)
                    if made.device != tensor.device:
                        raise TraceError(
                            f"{path or 'the model'}: forward, or a hook around it, moves its {name} ({tensor.device}) "
                            f"to {made.device}; move weights before"
                        )
                    if made.dtype == tensor.dtype:
                        continue
                    key = id(held), name
                    _, before, dtype = casts.setdefault(key, (held, dict.__getitem__(held, name), tensor.dtype))
                    if made.dtype == dtype and _has_all(tensor.dtype, dtype):
                        made = before
                        del casts[key]
                    dict.__setitem__(held, name, made)
        return module

    return apply


def uncast(casts: Casts) -> None:
    """Give copied modules the weights back that they had."""
    for (_, name), (holder, before, _) in casts.items():
        dict.__setitem__(holder, name, before)
    casts.clear()


def _has_all(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one floating-point type is one of another."""
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    one, other = torch.finfo(wide), torch.finfo(narrow)
    least = one.smallest_normal * one.eps <= other.smallest_normal * other.eps
    return least and one.eps <= other.eps and one.max >= other.max


def _odd(model: nn.Module) -> Iterator[str]:
    name_of = type(model).__name__
    for path, module in named_modules_of(model):
        where = path or name_of
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{where} is a ScriptModule (torch.jit), which cannot be looked into; port what it was made of"
            return
        yield from _wrapper(where, module)
        own = {name: item for name, item in vars(module).items() if type(item) not in _OTHERS}
        for name, item in own.items():
            if isinstance(item, torch.ScriptObject):
                yield f"{where}.{name} is packed (a {type(item).__name__}); give the model plain weights (dequantised)"
        yield from _hooks(where, module)
        for holder in (module._parameters, module._buffers, own):
            check = odd_tensor if holder is own else odd_weight_tensor
            for name, tensor in dict.items(holder):
                if isinstance(tensor, torch.Tensor):
                    yield from _odd_inside(f"{path}.{name}" if path else name, tensor, check)


def _odd_inside(name: str, tensor: torch.Tensor, check: Callable[[str, torch.Tensor], str | None]) -> Iterator[str]:
    """What of a tensor, or of those that it is made of, cannot be traced."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(tensor, tensors.DTensor):
        yield from (why for part, inner in parts_inside(name, tensor) if (why := check(part, inner)))
    elif (why := odd_tensor(name, tensor)) is not None:
        yield why


def _wrapper(where: str, module: nn.Module) -> Iterator[str]:
    fsdp: Any = sys.modules.get(_FSDP)
    if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        yield f"{where} is sharded by FSDP, whose hooks gather and free its weights; port the model without it"
    if isinstance(module, _WRAPPERS):
        yield f"{where} is wrapped in {type(module).__name__}; port what it wraps, its `module`"


def _hooks(where: str, module: nn.Module) -> Iterator[str]:
    registry = vars(module).get("_diffusers_hook")
    for hook in getattr(registry, "hooks", {}).values():
        if (what := _HOOKS.get(type(hook).__module__)) is not None:
            kind = type(hook).__name__
            yield f"{where} has a hook of diffusers, {kind}, which {what}; port the model without it"

"""What of a pipeline is divided: denoisers, and the decoders and encoders beside them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

from xdit_ir.errors import ParallelizeError
from xdit_ir.porting.denoisers import check_names, components, denoisers, takes_timestep
from xdit_ir.porting.methods import PortedMethod
from xdit_ir.porting.ported import Ported
from xdit_ir.porting.programs_of import ProgramsOf
from xdit_ir.reflection.methods import StandIn

# The interface of autoencoders, as a timestep is that of denoisers; they have no forward that pipelines call.
METHODS = ("encode", "decode")


def coders(module: nn.Module) -> dict[str, types.MethodType]:
    """The methods of an autoencoder by which pipelines call it."""
    found = {name: getattr(module, name, None) for name in METHODS}
    for method in found.values():
        if isinstance(method, StandIn):
            raise ParallelizeError(f"{method.original.__qualname__} is ported already")
    return {name: method for name, method in found.items() if isinstance(method, types.MethodType)}


def takes_ids(module: nn.Module) -> bool:
    """Whether forward takes a text as ids of its tokens, by the name that this has in the interface of transformers."""
    try:
        return "input_ids" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False


def ports(pipe: Any) -> dict[str, ProgramsOf]:
    """All that is ported of a pipeline, in its order: modules by their names, and methods (`vae.decode`)."""
    found: dict[str, ProgramsOf] = {}
    for name, module in components(pipe).items():
        if isinstance(module, Ported):
            found[name] = module
        methods = ((method, vars(module).get(method)) for method in METHODS)
        found |= {f"{name}.{method}": one for method, one in methods if isinstance(one, PortedMethod)}
    return found


def split(
    pipe: Any, named: Sequence[str] | None, only_denoisers: Sequence[str] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The denoisers of a pipeline, and its other modules that may be divided: all there are, or those that are named.

    Raises:
        ParallelizeError: there is no denoiser and nothing is named, or a name is none of a module.
    """
    modules = components(pipe)
    if named is None:
        found = denoisers(pipe, only_denoisers)
        same = {id(module) for module in found.values()}
        rest = {} if only_denoisers is not None else modules
        return found, {name: module for name, module in rest.items() if id(module) not in same}
    check_names("components", named, modules)
    found = {name: modules[name] for name in named if takes_timestep(modules[name])}
    found |= denoisers(pipe, only_denoisers) if only_denoisers else {}
    return found, {name: modules[name] for name in named if name not in found}

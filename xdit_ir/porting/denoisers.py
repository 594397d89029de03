"""Which components of a pipeline are denoisers, and how a pipeline is given others in their place."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from xdit_ir.errors import ParallelizeError

TIMESTEP = re.compile(r"(^|_)timesteps?(_|$)|(^|_)(t|time|sigma)$")


def components(pipe: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline by name: of any object that has a mapping `components`, as diffusers pipelines do.

    Raises:
        ParallelizeError: it has none.
    """
    found = getattr(pipe, "components", None)
    if not isinstance(found, Mapping):
        raise ParallelizeError(
            f"port takes a module, or a pipeline with a mapping `components` of its modules; got {type(pipe).__name__}"
        )
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def takes_timestep(module: nn.Module | type[nn.Module]) -> bool:
    """Whether a parameter of `forward` is a timestep by its name, which is part of the interface of a denoiser: text
    and image encoders, autoencoders and vocoders have none, since they run before or after the denoising steps."""
    try:
        names = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    return any(TIMESTEP.search(name) for name in names)


def denoisers(pipe: Any, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The components that a pipeline runs once per denoising step: those whose forward takes a timestep, or those that
    are named.

    Raises:
        ParallelizeError: there are none, or a name is none of a module.
    """
    modules = components(pipe)
    if names is not None:
        check_names("denoisers", names, modules)
        return {name: modules[name] for name in names}
    found = {name: module for name, module in modules.items() if takes_timestep(module)}
    if not found:
        raise ParallelizeError(
            f"no component of {type(pipe).__name__} has a forward that takes a timestep; "
            f"name what to divide with denoisers=[...]; its modules: {_known(modules)}"
        )
    return found


def check_names(option: str, names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Raise `ParallelizeError` for what names no modules."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        like = names if isinstance(names, str) else next(iter(modules), "transformer")
        raise ParallelizeError(f"{option}={names!r}: expected a list of names, as in {option}=[{like!r}]")
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(str(name), modules, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ParallelizeError(
                f"{option}: the pipeline has no module {name!r}; {hint}its modules: {_known(modules)}"
            )


def _known(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(modules) or "none"


def replace(pipe: Any, found: Mapping[str, nn.Module], stand_in: Callable[[str, nn.Module], nn.Module]) -> None:
    """Give a pipeline a stand-in for each of `found`; a module that it has under two names gets one.

    All stand-ins are made before the first is set, so that an error leaves the pipeline as it was.
    """
    made = {id(module): stand_in(name, module) for name, module in reversed(list(found.items()))}
    for name, module in found.items():
        setattr(pipe, name, made[id(module)])
    lost = [name for name, module in components(pipe).items() if name in found and module is not made[id(found[name])]]
    if lost:
        raise ParallelizeError(f"{type(pipe).__name__} does not take another module as its attribute {lost[0]!r}")

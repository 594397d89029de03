"""The zoo: diffusion transformers as data.

`load("flux.1-dev:tiny")` gives a model with random weights and the inputs of one forward.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import entries as _entries
from . import parts as _parts
from . import pipelines as _pipelines
from .build import build, named
from .kinds.data import KINDS
from .specs import ComplexRope, Entry, Ids, Integers, Made, Mask, Normal, Part, Rope, Target, Values, materialize
from .weights import randomize

__all__ = [
    "ComplexRope",
    "Entry",
    "Ids",
    "Integers",
    "Made",
    "Mask",
    "Normal",
    "Part",
    "Rope",
    "UnknownModelError",
    "Values",
    "entry",
    "families",
    "kinds",
    "load",
    "load_part",
    "load_pipeline",
    "names",
    "part",
    "part_calls",
    "part_names",
    "pipeline_names",
    "randomize",
]


class UnknownModelError(LookupError):
    """The zoo has no model of that name; the message lists the nearest ones."""

    def __init__(self, name: str, known: list[str]) -> None:
        near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.3) or known
        super().__init__(f"no model {name!r} in the zoo; nearest: {', '.join(near)}")


def names() -> list[str]:
    """The names of all models, sorted; `load` takes each with `:tiny` appended, and bare if it has `full`."""
    return sorted(_registry())


def kinds() -> list[str]:
    """The names of small modules that each do one thing that research code does; `load` takes them with `:tiny`."""
    return sorted(KINDS)


def entry(name: str) -> Entry:
    """The data behind a name (with or without `:tiny`)."""
    registry = {**_registry(), **KINDS}
    base, colon, variant = name.partition(":")
    if base not in registry or (colon and variant not in ("tiny", *registry[base].sizes)):
        variants = ((known, suffix) for known, data in registry.items() for suffix in ("", "tiny", *data.sizes))
        raise UnknownModelError(name, [f"{known}:{suffix}".rstrip(":") for known, suffix in variants])
    return registry[base]


def load(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights, in eval mode, and the keyword arguments of one forward.

    `name` is one of `names()` (published size), or that plus `:tiny`: a few narrow layers of every kind the
    model has, 256 image or video tokens, 16 text tokens, batch 2, ragged masks; or plus `:` and one of the entry's
    `sizes`. `dtype` defaults to float32.
    On the meta device nothing is allocated: parameters, buffers, latents, text features and rotary tables are
    meta tensors; timesteps, masks and ids are small real CPU tensors, so that a tracer may read their values.
    """
    data = entry(name)
    variant = name.partition(":")[2]
    tiny = variant == "tiny"
    config = data.tiny if tiny else data.full
    inputs = data.tiny_inputs if tiny else {**data.full_inputs, **data.sizes.get(variant, {})}
    if config is None:
        raise LookupError(f"{name!r} has only a tiny configuration in the zoo: load {name + ':tiny'!r}")
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    target = Target(torch.device(device), dtype or torch.float32, generator)
    model = build(data.cls, dict(config), target.device, target.dtype)
    return randomize(model, seed), materialize(dict(inputs), target)


def pipeline_names() -> list[str]:
    """The names of all pipelines, as `load_pipeline` takes them."""
    return sorted(_pipelines.ENTRIES)


def load_pipeline(
    name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Any]]:
    """A pipeline of diffusers with random weights, and the arguments of a call."""
    if name not in _pipelines.ENTRIES:
        raise UnknownModelError(name, pipeline_names())
    return _pipelines.assemble(_pipelines.ENTRIES[name], load, torch.device(device), dtype)


def part_names() -> list[str]:
    """The names of all decoders and encoders."""
    return sorted(_part_registry())


def part_calls() -> list[str]:
    """All decoders and encoders, each with one of its methods: `kl decode`."""
    return [f"{name} {call}" for name in part_names() for call in part(name).calls]


def part(name: str) -> Part:
    """The data behind the name of a decoder or encoder."""
    registry = _part_registry()
    if name not in registry:
        raise UnknownModelError(name, list(registry))
    return registry[name]


def _part_registry() -> dict[str, Part]:
    found = pkgutil.iter_modules(_parts.__path__, _parts.__name__ + ".")
    modules = (importlib.import_module(info.name) for info in found)
    return {name: data for module in modules for name, data in module.ENTRIES.items()}


def load_part(name: str, call: str, *, seed: int = 0) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A tiny decoder or encoder with random weights, in eval mode, as the method of it that is `call`, and the keyword
    arguments of such a call. It was called once, as some install hooks then."""
    data = part(name)
    target = Target(torch.device("cpu"), torch.float32, torch.Generator("cpu").manual_seed(seed + 1))
    config = dict(data.config)
    if data.made_from:
        config = {"config": named(data.made_from)(**config)}
    with torch.random.fork_rng(devices=[]):
        model = randomize(build(data.cls, config, target.device, target.dtype), seed)
    for attribute, value in data.state.items():
        setattr(model, attribute, value)
    method: Callable[..., Any] = getattr(model, call)
    example = materialize(dict(data.calls[call]), target)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        method(**example)
    return method, example


def families() -> list[ModuleType]:
    """The modules of `models.entries`, each with a mapping `ENTRIES` from names to data."""
    found = pkgutil.iter_modules(_entries.__path__, _entries.__name__ + ".")
    return [importlib.import_module(info.name) for info in found]


def _registry() -> dict[str, Entry]:
    return {name: data for family in families() for name, data in family.ENTRIES.items()}

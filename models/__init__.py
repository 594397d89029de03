"""The zoo: diffusion transformers as data.

`load("flux.1-dev:tiny")` gives a model with random weights and the inputs of one forward.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import entries as _entries
from .build import build
from .kinds.data import KINDS
from .specs import ComplexRope, Entry, Ids, Integers, Made, Mask, Normal, Rope, Target, Values, materialize
from .weights import randomize

__all__ = [
    "ComplexRope",
    "Entry",
    "Ids",
    "Integers",
    "Made",
    "Mask",
    "Normal",
    "Rope",
    "UnknownModelError",
    "Values",
    "entry",
    "families",
    "kinds",
    "load",
    "names",
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


def families() -> list[ModuleType]:
    """The modules of `models.entries`, each with a mapping `ENTRIES` from names to data."""
    found = pkgutil.iter_modules(_entries.__path__, _entries.__name__ + ".")
    return [importlib.import_module(info.name) for info in found]


def _registry() -> dict[str, Entry]:
    return {name: data for family in families() for name, data in family.ENTRIES.items()}

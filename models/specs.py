"""Zoo entries as data: a model class by name, two configurations, and a description of one forward's inputs.

An input description is a Python scalar, a spec of this module, or a list, tuple or dict of descriptions;
`materialize` turns it into tensors.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Normal:
    """Latents or text features: N(0, 1) of `shape` in the model's dtype; on meta, a meta tensor."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Values:
    """A small real tensor holding `values`; `dtype` is a torch dtype name, or None for the model's dtype."""

    values: Sequence[Any] | float
    dtype: str | None = None


@dataclass(frozen=True)
class Mask:
    """A real prefix mask [len(lengths), size]: sample i keeps its first `lengths[i]` tokens."""

    size: int
    lengths: tuple[int, ...]
    dtype: str = "int64"


@dataclass(frozen=True)
class Ids:
    """Real position ids [prod(grid), 3] in the model's dtype; the last len(grid) columns hold coordinates.

    `Ids((n,), origin=True)` gives n rows of zeros (text tokens).
    """

    grid: tuple[int, ...]
    origin: bool = False


@dataclass(frozen=True)
class Rope:
    """A pair (cos, sin) of float32 rotary tables [prod(grid), sum(dims)]; on the meta device, meta tensors.

    Column group i holds the dims[i] columns of grid axis order[i] (by default axis i), with frequencies
    repeated pairwise; neighbouring positions are `step` apart. `layout` "halves" repeats a group's frequencies
    one after the other, "once" has each only once. `heads` divides the columns into [heads, rows, columns of a
    head]; `batch` repeats everything in a new first dimension.
    """

    grid: tuple[int, ...]
    dims: tuple[int, ...]
    step: float = 1.0
    order: tuple[int, ...] | None = None
    layout: str = "pairs"
    heads: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Integers:
    """Real random integers of `shape`, uniform in [low, high); on meta, CPU integers."""

    shape: tuple[int, ...]
    high: int
    low: int = 0
    dtype: str = "int64"


@dataclass(frozen=True)
class Made:
    """An object such as a key-value cache: `path` ("module:name") called with `args`, then `state` set on it.

    Keys of `state` are dotted attribute paths (digits index lists), its values descriptions.
    """

    path: str
    args: tuple[Any, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComplexRope:
    """A complex64 rotary table [*grid, dim / 2], the axes' columns interleaved; on meta, a meta tensor."""

    grid: tuple[int, int]
    dim: int


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: a class, its published and its tiny configuration, and their inputs.

    `cls` is a name that diffusers exports, or "package.module:Class". Without `full`, only the tiny one can be loaded.
    `sizes` are other inputs of the published one, by name; what one of them leaves out is as in `full_inputs`.
    `no_denoiser` says what it is if it is no denoiser.
    """

    cls: str
    full: Mapping[str, Any] | None = None
    full_inputs: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    tiny_inputs: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    no_denoiser: str = ""


@dataclass(frozen=True)
class Part:
    """A decoder or encoder beside a denoiser: a class (as in `Entry`), a tiny configuration, and the arguments of the
    methods that pipelines call. `made_from` is the class of the configuration object that the class takes; `state` is
    set on the module, keys being attributes.
    """

    cls: str
    config: Mapping[str, Any]
    calls: Mapping[str, Mapping[str, Any]]
    made_from: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """Where and how `materialize` makes tensors; random values come from `generator` (on the CPU)."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def real(self) -> torch.device:
        """The device of tensors that hold values even when the model is on meta."""
        return torch.device("cpu") if self.device.type == "meta" else self.device


def materialize(spec: Any, target: Target) -> Any:
    """The value a description stands for; containers keep their type, scalars and None pass through."""
    match spec:
        case Normal(shape):
            if target.device.type == "meta":
                return torch.empty(shape, dtype=target.dtype, device="meta")
            noise = torch.randn(shape, generator=target.generator, device="cpu")
            return noise.to(target.device, target.dtype)
        case Values(values, dtype):
            return torch.tensor(values, dtype=_dtype(dtype, target), device=target.real)
        case Mask(size, lengths, dtype):
            kept = torch.arange(size, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
            return kept.to(target.real, _dtype(dtype, target))
        case Ids():
            return _ids(spec).to(target.real, target.dtype)
        case Rope():
            return _rope(spec, target.device)
        case ComplexRope():
            return _complex_rope(spec, target.device)
        case Integers(shape, high, low, dtype):
            drawn = torch.randint(low, high, shape, generator=target.generator, device="cpu")
            return drawn.to(target.real, _dtype(dtype, target))
        case Made():
            return _made(spec, target)
        case dict():
            return {key: materialize(value, target) for key, value in spec.items()}
        case list() | tuple():
            return type(spec)(materialize(value, target) for value in spec)
        case _:
            return spec


def _dtype(name: str | None, target: Target) -> torch.dtype:
    if name is None:
        return target.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _positions(grid: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """Float32 [prod(grid), len(grid)]: the coordinates of a grid in row-major order."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(grid))


def _ids(spec: Ids) -> torch.Tensor:
    ids = torch.zeros(math.prod(spec.grid), 3, device="cpu")
    if not spec.origin:
        ids[:, 3 - len(spec.grid) :] = _positions(spec.grid, "cpu")
    return ids


def _rope(spec: Rope, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    positions = _positions(spec.grid, device) * spec.step
    angles = []
    for axis, dim in zip(spec.order or range(len(spec.dims)), spec.dims, strict=True):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        angle = positions[:, axis, None] * (1.0 / 10000.0**exponents)
        if spec.layout == "pairs":
            angle = angle.repeat_interleave(2, dim=1, output_size=dim)
        angles.append(torch.cat([angle, angle], dim=1) if spec.layout == "halves" else angle)
    table = torch.cat(angles, dim=1)
    if spec.heads is not None:
        table = table.reshape(table.shape[0], spec.heads, -1).transpose(0, 1)
    if spec.batch is not None:
        table = table.expand(spec.batch, *table.shape).contiguous()
    return table.cos(), table.sin()


def _made(spec: Made, target: Target) -> Any:
    module, _, name = spec.path.partition(":")
    made = getattr(importlib.import_module(module), name)(*spec.args)
    for path, value in spec.state.items():
        *owners, attribute = path.split(".")
        owner = made
        for step in owners:
            owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
        setattr(owner, attribute, materialize(value, target))
    return made


def _complex_rope(spec: ComplexRope, device: torch.device) -> torch.Tensor:
    quarter = spec.dim // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    angles = _positions(spec.grid, device)[:, None] * (1.0 / 10000.0**exponents)[:, None]
    return torch.polar(torch.ones_like(angles), angles).reshape(*spec.grid, 2 * quarter)

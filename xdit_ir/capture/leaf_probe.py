"""Opaque leaves described by probing them: what they return, how much they compute, along which dims they may be
divided."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from xdit_ir.capture.calls import SubmoduleCall
from xdit_ir.capture.failures import ShapeDepends
from xdit_ir.capture.kept_state import same_contents
from xdit_ir.capture.outputs import flatten_output, literal, output_tensors, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.state import StateWatch, refusal, unchanged
from xdit_ir.capture.values import spec_of
from xdit_ir.errors import TraceError
from xdit_ir.ir.leaf import Leaf, order_of
from xdit_ir.ir.program import TensorSpec

_PROBE_BYTES = 1 << 28  # weights made up for the probe of a module on the meta device
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Probe:
    """Inputs as which values may decide differently: their scale; rows small and large (`spread`); a dim along which
    every index has a place of its own, near which all its rows are (`apart`), or all are `equal`; whether what is
    `known` has its true contents, or others of the same range, which the module may not be able to take."""

    scale: float = 1.0
    spread: bool = False
    apart: int | None = None
    equal: int | None = None
    known: bool = True


_PROBES = (
    *(_Probe(scale, spread=True) for scale in (1.0, 0.01, 0.1, 0.3, 3.0, 10.0)),
    *(_Probe(scale, apart=dim) for scale in (1.0, 3.0) for dim in (0, 1)),
    *(_Probe(equal=dim) for dim in (0, 1)),
    *(_Probe(scale, known=False) for scale in (1.0, 0.3, 3.0)),
)
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@dataclass(frozen=True, eq=False)
class DescribedLeaf:
    """A leaf, and how its results and literals make up what the module returns."""

    leaf: Leaf
    call: SubmoduleCall
    outputs: list[Any]
    out_spec: pytree.TreeSpec


def probed(recorder: Recorder, path: str, reason: str, module: nn.Module, call: SubmoduleCall) -> DescribedLeaf:
    """The leaf for a call of the module at `path`, which is run on made-up inputs, or if it is too large guessed."""
    leaves = tuple(spec_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves)
    kind = recorder.device.type
    cast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    state, orders = state_of(module), tuple(order_of(leaf) for leaf in call.leaves if isinstance(leaf, torch.Tensor))
    made = (module, reason, leaves, call.spec, tuple(state), (), unflatten_output, output_tensors)
    leaf = Leaf(*made, cast=cast, orders=orders)
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        weights = _weights(state)
        if weights is None:
            return _guessed(leaf, call)
        with unchanged(module):
            return _measured(recorder, path, leaf, call, weights)


def _measured(
    recorder: Recorder, path: str, leaf: Leaf, call: SubmoduleCall, weights: list[torch.Tensor]
) -> DescribedLeaf:
    device = weights[0].device if weights else recorder.device
    before = torch.get_rng_state()
    runs: list[tuple[list[torch.Tensor], list[Any], pytree.TreeSpec, int]] = []
    for seed, probe in enumerate(_PROBES):
        inputs = _inputs(recorder, call, device, seed)
        try:
            with FlopCounterMode(display=False) as counter:
                output = leaf.run(inputs, weights)
        except _FAILURES:
            if probe.known:
                raise
            continue
        flat, out_spec = flatten_output(output)
        if not probe.known and _shapes(flat) != _shapes(runs[0][1]):
            continue
        runs.append((inputs, flat, out_spec, counter.get_total_flops()))
        if seed == 0:
            filled = StateWatch([("", leaf.module)])  # with what is kept from the first call on
    if written := [write for write in filled.changes() if not same_contents(write.after, write.before)]:
        raise refusal(written)
    shapes = [[spec_of(x) if isinstance(x, torch.Tensor) else literal(x) for x in flat] for _, flat, _, _ in runs]
    if any(str(shape) != str(shapes[0]) or run[2] != runs[0][2] for shape, run in zip(shapes, runs, strict=True)):
        raise ShapeDepends(path)
    outputs = tuple(item for item in shapes[0] if isinstance(item, TensorSpec))
    draws = not torch.equal(torch.get_rng_state(), before)
    leaf = replace(leaf, outputs=outputs, flops=max(run[3] for run in runs), draws=draws)
    results = [[x for x in flat if isinstance(x, torch.Tensor)] for _, flat, _, _ in runs]
    leaf = replace(leaf, aligned=tuple(_aligned(leaf, weights, [run[0] for run in runs], results)))
    return DescribedLeaf(leaf, call, shapes[0], runs[0][2])


def _shapes(flat: list[Any]) -> list[Any]:
    return [x.shape if isinstance(x, torch.Tensor) else None for x in flat]


def _inputs(recorder: Recorder, call: SubmoduleCall, device: torch.device, seed: int) -> list[torch.Tensor]:
    """Random numbers for what is computed, true contents for what is known."""
    generator, probe = torch.Generator().manual_seed(seed), _PROBES[seed]
    made: list[torch.Tensor] = []
    for item in call.leaves:
        if isinstance(item, torch.Tensor):
            known = recorder.value(item).known
            if known is None:
                value = _random(spec_of(item), generator, probe)
                value = value * probe.scale if value.is_floating_point() else value
            else:
                value = known.clone() if probe.known else _others(known, generator)
            made.append(value.to(device))
    return made


def _others(known: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Integers from zero on of the same range, many of them at an end of it; other numbers as they are."""
    if known.is_floating_point() or known.is_complex() or not known.numel():
        return known.clone()
    least, most = min(int(known.min()), 0), max(int(known.max()), 1)
    made = torch.randint(least, most + 1, known.shape, generator=generator)
    end = torch.randint(0, 2, known.shape, generator=generator) * (most - least) + least
    return torch.where(torch.rand(known.shape, generator=generator) < 0.75, end, made).to(known.dtype)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and buffers."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _random(spec: TensorSpec, generator: torch.Generator, probe: _Probe = _Probe(spread=True)) -> torch.Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        shape, last = spec.shape, len(spec.shape) - 1
        made = torch.randn(shape, generator=generator)
        if probe.apart is not None and probe.apart < last:
            places = [size if d in (probe.apart, last) else 1 for d, size in enumerate(shape)]
            made = torch.randn(places, generator=generator) + 0.1 * made
        if probe.equal is not None and probe.equal < last:
            made = made.narrow(probe.equal, 0, min(shape[probe.equal], 1)).expand(shape).clone()
        for dim in range(last if probe.spread else 0):  # so that what mixes or compares rows shows
            sizes = [size if d == dim else 1 for d, size in enumerate(shape)]
            order = torch.randperm(shape[dim], generator=generator)
            made = made * 10 ** torch.linspace(-1, 1, shape[dim])[order].view(sizes)
        return made.to(spec.dtype)
    return torch.randint(0, 2, spec.shape, generator=generator).to(spec.dtype)


def _weights(state: Mapping[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """The module's own weights, random ones where there are only shapes, or None where those would be too many."""
    hollow = sum(x.numel() * x.itemsize for x in state.values() if x.is_meta)
    if hollow > _PROBE_BYTES:
        return None
    generator = torch.Generator().manual_seed(0)
    return [_weight(x, generator) if x.is_meta else x.detach() for x in state.values()]


def _weight(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return _random(spec_of(tensor), generator)
    made = torch.randn(tensor.shape, generator=generator)
    return (made / max(tensor.shape[-1], 1) ** 0.5 if tensor.dim() > 1 else made).to(tensor.dtype)


def _guessed(leaf: Leaf, call: SubmoduleCall) -> DescribedLeaf:
    """For a module too large to be probed: it maps one tensor to one like it, whole. Checked when it runs."""
    tensors = [item for item in leaf.leaves if isinstance(item, TensorSpec)]
    if len(tensors) != 1:
        raise TraceError(
            f"{leaf.reason}; what it returns cannot be known from the meta device: trace it with real weights"
        )
    guessed = replace(leaf, outputs=(tensors[0],))
    return DescribedLeaf(guessed, call, [tensors[0]], pytree.tree_structure(0))


def _aligned(
    leaf: Leaf, weights: list[torch.Tensor], inputs: list[list[torch.Tensor]], results: list[list[torch.Tensor]]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The dims along which any selection of indices gives the same selection of all results, in every probe."""
    for dim in range(min((result.dim() for result in results[0]), default=0)):
        sizes = {result.shape[dim] for result in results[0]}
        for operands in _divisible(inputs[0], dim, results[0][0]) if len(sizes) == 1 else ():
            if all(
                _selects(leaf, weights, given, made, dim, operands, seed)
                for seed, (given, made) in enumerate(zip(inputs, results, strict=True))
            ):
                yield dim, operands
                break


def _divisible(inputs: list[torch.Tensor], dim: int, result: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Which operands may be divided with a dim of a result: all that are as long there, or those of as many dims."""
    size = result.shape[dim]
    long = tuple(i for i, x in enumerate(inputs) if x.dim() > dim and x.shape[dim] == size > 1)
    yield from dict.fromkeys(some for some in (long, tuple(i for i in long if inputs[i].dim() == result.dim())) if some)


def _selects(
    leaf: Leaf,
    weights: list[torch.Tensor],
    given: list[torch.Tensor],
    results: list[torch.Tensor],
    dim: int,
    operands: tuple[int, ...],
    seed: int,
) -> bool:
    size = results[0].shape[dim]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    half = (size + 1) // 2
    for chosen in filter(len, dict.fromkeys((range(1), range(half), range(half, size), range(size)))):
        index = order[chosen.start : chosen.stop].to(results[0].device)
        part = [x.index_select(dim, index) if i in operands else x for i, x in enumerate(given)]
        try:
            found = leaf.flatten(leaf.run(part, weights))
        except _FAILURES:
            return False
        expected = [result.index_select(dim, index) for result in results]
        if len(found) != len(expected) or not all(map(_close, found, expected)):
            return False
    return True


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(found, expected)
    wide = _TOLERANCE if found.dtype in (torch.float32, torch.float64) else 3e-2
    return bool(((found - expected).float().norm() <= wide * expected.float().norm().clamp(min=1e-20)).item())

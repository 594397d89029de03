"""The fallback ladder: a submodule that cannot be captured becomes an opaque leaf, described by probing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from xdit_ir.capture.calls import SubmoduleCall, describe_call
from xdit_ir.capture.failures import ShapeDepends
from xdit_ir.capture.fingerprint import fingerprint
from xdit_ir.capture.outputs import flatten_output, literal, output_tensors, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.state import StateWatch, refusal, same_contents, unchanged
from xdit_ir.capture.values import NO_ROOTS, Origin, spec_of
from xdit_ir.errors import TraceError
from xdit_ir.ir.leaf import Leaf, order_of
from xdit_ir.ir.program import TensorSpec

_SCALES = (1.0, 0.01, 0.1, 0.3, 3.0, 10.0)  # of the inputs of probes: values may decide differently for each
_PROBE_BYTES = 1 << 28  # weights made up for the probe of a module on the meta device
_TOLERANCE = 1e-4

Wanted = str | type | nn.Module
Reasons = dict[str, str]


def named_leaves(model: nn.Module, wanted: Sequence[Wanted]) -> Reasons:
    """The modules that the caller wants as leaves, by path; raises `TraceError` for what is not in the model."""
    found: Reasons = {}
    for item in wanted:
        paths = [path for path, module in model.named_modules() if path and _is_meant(item, path, module)]
        if not paths:
            raise TraceError(f"leaf: the model has no submodule {item!r}; name one of its paths, classes or submodules")
        found |= dict.fromkeys(paths, "asked for")
    return found


def _is_meant(item: Wanted, path: str, module: nn.Module) -> bool:
    if isinstance(item, str):
        return item in (path, type(module).__name__)
    return isinstance(module, item) if isinstance(item, type) else module is item


def like(model: nn.Module, path: str) -> list[str]:
    """The modules of the same class as that at `path`: what hinders one hinders all."""
    kind = type(model.get_submodule(path))
    return [name for name, module in model.named_modules() if name and type(module) is kind]


@dataclass(frozen=True, eq=False)
class _Described:
    """A leaf, and how its results and literals make up what the module returns."""

    leaf: Leaf
    call: SubmoduleCall
    outputs: list[Any]
    out_spec: pytree.TreeSpec


class Leaves:
    """The leaves of one trace: `paths` with the reason of each, `originals` the model's own modules."""

    def __init__(self, recorder: Recorder, paths: Reasons, originals: Mapping[str, nn.Module]) -> None:
        self.recorder, self.paths, self.originals = recorder, paths, originals
        self._described: list[_Described] = []

    def wants(self, path: str) -> bool:
        """Whether the module at this path is a leaf."""
        return path in self.paths

    def below(self, path: str) -> frozenset[str]:
        """The leaves inside the module at `path`, relative to it."""
        return frozenset(relative for relative, _ in names_below(self.paths, path))

    def call(self, path: str, copied: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Emit the node that stands for a call of the module."""
        recorder, module = self.recorder, self.originals[path]
        with recorder.recording(False):
            call = describe_call(recorder, module.forward, args, kwargs)
            given, spec = flatten_output((tuple(args), dict(kwargs)))
            call = replace(call, leaves=given, spec=spec)
            described = self._describe(path, module, call)
            leaf = described.leaf
            state = [recorder.node(tensor) for tensor in _state(copied).values()]
            inputs = [recorder.node(leaf_) for leaf_ in call.leaves if isinstance(leaf_, torch.Tensor)]
            specs: Any = leaf.outputs[0] if leaf.single else leaf.outputs
            node = recorder.emit("call_function", leaf, (inputs, state), {}, specs, recorder.where(), leaf.__name__)
            roots = NO_ROOTS.union(*(value.roots for value in call.values), {Origin.PARAMETER})
            parts = [node] if leaf.single else [recorder.item(node, i, spec) for i, spec in enumerate(leaf.outputs)]
            made = [recorder.tensor(part, roots) for part in parts]
        feed = iter(made)
        leaves = [next(feed) if isinstance(item, TensorSpec) else item.value for item in described.outputs]
        return unflatten_output(leaves, described.out_spec)

    def _describe(self, path: str, module: nn.Module, call: SubmoduleCall) -> _Described:
        for found in self._described:
            if found.call.key == call.key and _same_structure(found.leaf.module, module):
                return found
        described = self._probe(path, module, call)
        self._described.append(described)
        return described

    def _probe(self, path: str, module: nn.Module, call: SubmoduleCall) -> _Described:
        leaves = tuple(spec_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves)
        kind = self.recorder.device.type
        cast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        state, orders = _state(module), tuple(order_of(leaf) for leaf in call.leaves if isinstance(leaf, torch.Tensor))
        made = (module, self.paths[path], leaves, call.spec, tuple(state), (), unflatten_output, output_tensors)
        leaf = Leaf(*made, cast=cast, orders=orders)
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            weights = _weights(state)
            if weights is None:
                return _guessed(leaf, call)
            with unchanged(module):
                return self._measured(path, leaf, call, weights)

    def _measured(self, path: str, leaf: Leaf, call: SubmoduleCall, weights: list[torch.Tensor]) -> _Described:
        device = weights[0].device if weights else self.recorder.device
        runs, before = [], torch.get_rng_state()
        for seed in range(len(_SCALES)):
            inputs = self._inputs(call, device, seed)
            with FlopCounterMode(display=False) as counter:
                output = leaf.run(inputs, weights)
            flat, out_spec = flatten_output(output)
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
        return _Described(leaf, call, shapes[0], runs[0][2])

    def _inputs(self, call: SubmoduleCall, device: torch.device, seed: int) -> list[torch.Tensor]:
        """Random numbers for what is computed, true contents for what is known."""
        generator = torch.Generator().manual_seed(seed)
        made: list[torch.Tensor] = []
        for item in call.leaves:
            if isinstance(item, torch.Tensor):
                known = self.recorder.value(item).known
                probe = _random(spec_of(item), generator) if known is None else known.clone()
                if known is None and probe.is_floating_point():
                    probe *= _SCALES[seed]
                made.append(probe.to(device))
        return made


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        made = torch.randn(spec.shape, generator=generator)
        for dim in range(len(spec.shape) - 1):  # small and large rows, so that what mixes or compares them shows
            shape = [size if d == dim else 1 for d, size in enumerate(spec.shape)]
            order = torch.randperm(spec.shape[dim], generator=generator)
            made = made * 10 ** torch.linspace(-1, 1, spec.shape[dim])[order].view(shape)
        return made.to(spec.dtype)
    return torch.randint(0, 2, spec.shape, generator=generator).to(spec.dtype)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


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


def _guessed(leaf: Leaf, call: SubmoduleCall) -> _Described:
    """For a module too large to be probed: it maps one tensor to one like it, whole. Checked when it runs."""
    tensors = [item for item in leaf.leaves if isinstance(item, TensorSpec)]
    if len(tensors) != 1:
        raise TraceError(
            f"{leaf.reason}; what it returns cannot be known from the meta device: trace it with real weights"
        )
    guessed = replace(leaf, outputs=(tensors[0],))
    return _Described(guessed, call, [tensors[0]], pytree.tree_structure(0))


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
    for count in {1, (size + 1) // 2, size}:
        index = order[:count].to(results[0].device)
        part = [x.index_select(dim, index) if i in operands else x for i, x in enumerate(given)]
        try:
            found = leaf.flatten(leaf.run(part, weights))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
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


def _same_structure(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules are interchangeable but for their weights."""
    return left is right or fingerprint(left, {}) == fingerprint(right, {})


def names_below(names: Iterable[str], path: str) -> Iterator[tuple[str, str]]:
    """Those of these names of modules that are inside the one at `path`, each relative to it and as it is."""
    inside = f"{path}." if path else ""
    return ((name[len(inside) :], name) for name in names if name.startswith(inside))

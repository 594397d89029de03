"""Opaque leaves: submodules that cannot be captured, or that the caller names, are called whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from xdit_ir.capture.calls import SubmoduleCall, describe_call
from xdit_ir.capture.leaf_probe import DescribedLeaf, probed, state_of
from xdit_ir.capture.outputs import flatten_output, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.values import NO_ROOTS, Origin
from xdit_ir.errors import TraceError
from xdit_ir.ir.program import TensorSpec
from xdit_ir.reflection.fingerprint import fingerprint

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


class Leaves:
    """The leaves of one trace: `paths` with the reason of each, `originals` the model's own modules."""

    def __init__(self, recorder: Recorder, paths: Reasons, originals: Mapping[str, nn.Module]) -> None:
        self.recorder, self.paths, self.originals = recorder, paths, originals
        self._described: list[DescribedLeaf] = []

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
            state = [recorder.node(tensor) for tensor in state_of(copied).values()]
            inputs = [recorder.node(leaf_) for leaf_ in call.leaves if isinstance(leaf_, torch.Tensor)]
            specs: Any = leaf.outputs[0] if leaf.single else leaf.outputs
            node = recorder.emit("call_function", leaf, (inputs, state), {}, specs, recorder.where(), leaf.__name__)
            roots = NO_ROOTS.union(*(value.roots for value in call.values), {Origin.PARAMETER})
            parts = [node] if leaf.single else [recorder.item(node, i, spec) for i, spec in enumerate(leaf.outputs)]
            made = [recorder.tensor(part, roots) for part in parts]
        feed = iter(made)
        leaves = [next(feed) if isinstance(item, TensorSpec) else item.value for item in described.outputs]
        return unflatten_output(leaves, described.out_spec)

    def _describe(self, path: str, module: nn.Module, call: SubmoduleCall) -> DescribedLeaf:
        for found in self._described:
            if found.call.key == call.key and _same_structure(found.leaf.module, module):
                return found
        described = probed(self.recorder, path, self.paths[path], module, call)
        self._described.append(described)
        return described


def _same_structure(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules are interchangeable but for their weights."""
    return left is right or fingerprint(left, {}) == fingerprint(right, {})


def names_below(names: Iterable[str], path: str) -> Iterator[tuple[str, str]]:
    """Those of these names of modules that are inside the one at `path`, each relative to it and as it is."""
    inside = f"{path}." if path else ""
    return ((name[len(inside) :], name) for name in names if name.startswith(inside))

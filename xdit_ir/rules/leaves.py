"""Opaque leaves: divided along the dims that they treat index by index, else run whole."""

from __future__ import annotations

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.partition import Partition
from xdit_ir.rules.base import OpCall, OpSharding, Rule, as_layouts, as_outputs, choose, verified, whole
from xdit_ir.rules.labels import handle_empty_parts


def _leaf(call: OpCall) -> OpSharding:
    """Along an aligned dim its operands agree; everything else is whole."""
    leaf = _target(call)
    wanted = (
        (dim, partition)
        for dim, aligned in leaf.aligned
        for operand in aligned
        if (partition := call.layouts[operand].dims[dim]) is not None
    )
    return _sharding(call, choose(call.mesh, wanted))


def _sharding(call: OpCall, chosen: dict[int, Partition]) -> OpSharding:
    leaf, inputs = _target(call), list(whole(call.specs))
    outputs = [Layout.whole(len(spec.shape)) for spec in call.results]
    for dim, aligned in leaf.aligned:
        if dim in chosen:
            outputs = [output.with_dims({dim: chosen[dim]}) for output in outputs]
            for operand in aligned:
                inputs[operand] = inputs[operand].with_dims({dim: chosen[dim]})
    kept = any(not layout.is_whole for layout in inputs)
    how = "runs on each rank's own part" if kept else "runs whole on every rank"
    reason = f"opaque leaf ({leaf.reason}): {how}"
    return handle_empty_parts(call, OpSharding(tuple(inputs), as_outputs(call, outputs), fallback=reason))


def _demand(call: OpCall, wanted: Layout | tuple[Layout, ...]) -> tuple[Layout, ...] | None:
    first = as_layouts(wanted)[0]
    return _sharding(call, {d: partition for d, partition in enumerate(first.dims) if partition is not None}).inputs


def _target(call: OpCall) -> Leaf:
    target = call.node.target
    assert isinstance(target, Leaf)
    return target


LEAF = verified(Rule(_leaf, _demand))

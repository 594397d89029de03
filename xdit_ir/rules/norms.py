"""Normalisations: the dims over which statistics are taken must be whole, the others are divided freely.

Group, instance and Euclidean norms take what is divided along these dims too, those over features what is divided along
mesh dims of features: a lowering adds the statistics up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import bound_arguments
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import FEATURES, Mesh
from xdit_ir.ir.partition import Runs
from xdit_ir.ir.program import SPEC
from xdit_ir.rules.base import (
    LocalCall,
    Localize,
    OpCall,
    OpSharding,
    Rule,
    as_layouts,
    rules_of,
    same_call,
    without_overlaps,
)
from xdit_ir.rules.labels import Labels, Names, by_argument, labelled, plain
from xdit_ir.rules.reductions import REDUCE, SUM, combined_dims, softmax_dims

aten = torch.ops.aten
SPREADS = (aten.var, aten.std, aten.var_mean, aten.std_mean)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
LOG_SOFTMAXES = (aten.log_softmax.int, aten._log_softmax.default)


def _layer_norm(call: OpCall) -> Labels:
    """layer_norm, rms_norm: the trailing `normalized_shape` dims; further results are statistics with ones there."""
    trailing = range(-len(call.arguments["normalized_shape"]), 0)
    return by_argument(
        call,
        *(plain(spec, trailing) for spec in call.results),
        input=plain(call.out, trailing),
    )


def _featured(call: OpCall, layout: Layout) -> Labels:
    """The same over one dim, that of features: ranks may have parts of these, as in this layout."""
    features = layout.dims[-1]
    given = call.arguments
    known = given["eps"] is not None or call.out.dtype.itemsize >= 4  # what stands for it in half precision varies
    divided = known and len(given["normalized_shape"]) == 1 and call.dividing_dims(features)
    if not divided or not divided <= {*FEATURES} or not call.mesh.tiles(features):  # type: ignore[arg-type]
        return _layer_norm(call)
    own = plain(call.out)
    return by_argument(call, own, input=own, weight=own[-1:], bias=own[-1:])


def _layer_norm_forward(call: OpCall) -> OpSharding:
    return labelled(lambda call: _featured(call, call.layouts[0])).forward(call)


def _layer_norm_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    return labelled(lambda call: _featured(call, wanted)).demand(call, wanted)


def _features(given: dict[str, Any]) -> tuple[int, ...]:
    """The last dim, which may be divided if it is all that a norm is over."""
    return (-1,) if len(given["normalized_shape"]) == 1 else ()


def divided_statistics(node: fx.Node, layout: Layout, mesh: Mesh) -> frozenset[str]:
    """The mesh dims along which ranks hold parts of what a norm takes statistics of, its operand having this layout."""
    dims_of = STATISTICS.get(node.target)
    if dims_of is None:
        return frozenset()
    return frozenset().union(*(mesh.dividing_dims(layout.dims[dim]) for dim in dims_of(bound_arguments(node))))


def _space(given: dict[str, Any]) -> range:
    """What is behind the channels, for a norm over that and over some of these; nothing by running statistics."""
    return range(0) if given.get("running_mean") is not None else range(2, len(given["input"].meta[SPEC].shape))


def _euclidean_dims(given: dict[str, Any]) -> list[int]:
    """Those of a root of a sum of squares; none of another norm."""
    spec, dims = given["self"].meta[SPEC], given["dim"]
    ndim = len(spec.shape)
    if given["ord"] != 2 or given["dtype"] not in (None, spec.dtype) or spec.dtype.is_complex:
        return []
    return [dim % ndim for dim in dims] if dims else list(range(ndim))


def _run(given: dict[str, Any]) -> list[int]:
    """The dim along which a sum runs, which goes on from the sums of other parts."""
    return [given["dim"]] if given["self"].meta[SPEC].shape else []


def _apart(given: dict[str, Any]) -> list[int]:
    """The dims that a scaled weight is normalised over: all but one; none if it has no such dim."""
    ndim, dim = len(given["v"].meta[SPEC].shape), given["dim"]
    return [d for d in range(ndim) if d != dim % ndim] if dim >= 0 else []


STATISTICS: dict[Any, Callable[[dict[str, Any]], Any]] = {
    aten.group_norm.default: _space,
    aten.instance_norm.default: _space,
    aten.linalg_vector_norm.default: _euclidean_dims,
    aten.layer_norm.default: _features,
    aten.rms_norm.default: _features,
    aten._weight_norm.default: _apart,
    aten.cumsum.default: _run,
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.logsumexp.default), combined_dims),
    **dict.fromkeys((*SOFTMAXES, *LOG_SOFTMAXES), softmax_dims),
    **{
        one: combined_dims
        for packet in SPREADS
        for one in map(partial(getattr, packet), ("default", "dim", "correction"))
    },
}


def _grouped(call: OpCall, layout: Layout, groups: int) -> Labels:
    """A norm over groups of channels and what is behind: ranks may have some of the groups, and parts of the rest."""
    channels, size = layout.dims[1], call.out.shape[1] // groups
    split = channels is not None and not all(_whole_groups(runs.runs, size) for runs in channels.parts)
    names = plain(call.out, [1] if split else [])
    return by_argument(call, names, input=names, weight=names[1:2], bias=names[1:2])


def _whole_groups(runs: Runs, size: int) -> bool:
    return all(start % size == 0 and length % size == 0 for start, length in runs)


def _groups(call: OpCall) -> int:
    """How many groups there are; an instance norm has one for each channel."""
    return int(call.arguments.get("num_groups", call.out.shape[1]))


def _local_groups(call: OpCall, sharding: OpSharding) -> Localize | None:
    """A rank's own groups."""
    output = as_layouts(sharding.outputs)[0]
    if output.dims[1] is None or "num_groups" not in call.arguments:
        return None
    size = call.out.shape[1] // _groups(call)
    return lambda rank: same_call(call, num_groups=output.local_shape(call.out.shape, rank)[1] // size)


def _grouped_norm(call: OpCall) -> OpSharding:
    if call.arguments.get("running_mean") is not None:
        return labelled(_running).forward(call)
    layout = without_overlaps(call, call.layouts[0], range(2, len(call.out.shape)))
    call = replace(call, layouts=(layout, *call.layouts[1:]))
    return labelled(lambda call: _grouped(call, layout, _groups(call)), _local_groups).forward(call)


def _grouped_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    """A part of the groups takes no communication beside that of what is behind, as it is; a part of one does."""
    if call.arguments.get("running_mean") is not None:
        return labelled(_running).demand(call, wanted)
    if any(wanted.dims[2:]) and wanted.dims[2:] != call.layouts[0].dims[2:]:
        return None
    return labelled(lambda call: _grouped(call, wanted, _groups(call))).demand(call, wanted)


def _euclidean(call: OpCall) -> OpSharding:
    if not _euclidean_dims(call.arguments):
        return REDUCE.forward(call)
    sharding = SUM.forward(call)
    assert isinstance(sharding.outputs, Layout)
    return replace(sharding, outputs=sharding.outputs.summed())


def _scaled_weight(call: OpCall, layout: Layout) -> Labels:
    """Rows are free, each with its norm; ranks may have parts of what a norm is over, as in this layout."""
    divided = [call.dividing_dims(layout.dims[dim]) for dim in _apart(call.arguments)]
    free = all(dims <= {*FEATURES} for dims in divided) and all(map(call.mesh.tiles, filter(None, layout.dims)))
    astray = [] if free and call.arguments["dim"] >= 0 else _apart(call.arguments) or range(len(layout.dims))
    names = plain(call.out, list(astray))
    return by_argument(call, names, v=names, g=names[len(names) - len(call.specs[1].shape) :])


def _scaled_weight_rule(call: OpCall) -> OpSharding:
    return labelled(lambda call: _scaled_weight(call, call.layouts[0])).forward(call)


def _scaled_weight_demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
    return labelled(lambda call: _scaled_weight(call, wanted)).demand(call, wanted)


def _moments(call: OpCall) -> Labels:
    """Two sums over all behind batch and groups."""
    return by_argument(call, (None, 0, 1), x=plain(call.specs[0]))


def _normalize(call: OpCall) -> Labels:
    """Pointwise: moments per sample and group, weights per group and channel."""
    own = plain(call.out)
    return by_argument(call, own, x=own, moments=(None, 0, 1), weight=(1, 2), bias=(1, 2))


def _native_group_norm(call: OpCall) -> Labels:
    """Statistics are taken over part of the channels and everything behind them."""
    results = (plain(spec, range(1, len(spec.shape))) for spec in call.results)
    return by_argument(call, *results, input=plain(call.out, range(1, len(call.out.shape))))


def _local_batch(call: OpCall, sharding: OpSharding) -> Localize:
    """`native_group_norm` is told the batch size."""
    output = as_layouts(sharding.outputs)[0]

    def local(rank: int) -> LocalCall:
        return same_call(call, N=output.local_shape(call.out.shape, rank)[0])

    return local


def _running(call: OpCall) -> Labels | str:
    """An instance norm by running statistics is pointwise per channel."""
    return (
        "instance norm with running statistics that it changes"
        if call.arguments["use_input_stats"]
        else _channels(call)
    )


def _channels(call: OpCall, *saved: Names) -> Labels:
    channel = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (1,))
    return by_argument(call, plain(call.out), *saved, input=plain(call.out), **channel)


def _batch_norm(call: OpCall) -> Labels | str:
    """With running statistics everything is pointwise per channel."""
    if call.arguments.get("training") or call.arguments.get("running_mean") is None:
        return "batch norm over the batch's own statistics"
    return _channels(call, *((1,) if spec.shape == call.out.shape[1:2] else (None,) for spec in call.results[1:]))


RULES = {
    **rules_of(labelled(_layer_norm), aten.native_layer_norm, aten._fused_rms_norm),
    **rules_of(Rule(_layer_norm_forward, _layer_norm_demand), aten.layer_norm, aten.rms_norm),
    **rules_of(Rule(_grouped_norm, _grouped_demand), aten.group_norm, aten.instance_norm),
    **rules_of(labelled(_native_group_norm, _local_batch), aten.native_group_norm),
    **rules_of(Rule(_euclidean, REDUCE.demand), aten.linalg_vector_norm),
    **rules_of(Rule(_scaled_weight_rule, _scaled_weight_demand), aten._weight_norm),
    **rules_of(labelled(_moments, sums=True), ops.moments),
    **rules_of(labelled(_normalize), ops.normalize),
    **rules_of(
        labelled(_batch_norm),
        aten.batch_norm,
        aten.native_batch_norm,
        aten._native_batch_norm_legit_no_training,
    ),
}

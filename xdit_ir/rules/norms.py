"""Normalisations: the dims over which statistics are taken must be whole, the others are divided freely."""

from __future__ import annotations

import torch

from xdit_ir.rules.base import LocalCall, Localize, OpCall, OpSharding, as_layouts, rules_of, same_call
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain

aten = torch.ops.aten


def _layer_norm(call: OpCall) -> Labels:
    """layer_norm, rms_norm: the trailing `normalized_shape` dims; further results are statistics with ones there."""
    trailing = range(-len(call.arguments["normalized_shape"]), 0)
    return by_argument(
        call,
        *(plain(spec, trailing) for spec in call.results),
        input=plain(call.out, trailing),
    )


def _group_norm(call: OpCall) -> Labels:
    """Statistics are taken over part of the channels and everything behind them."""
    results = (plain(spec, range(1, len(spec.shape))) for spec in call.results)
    return by_argument(call, *results, input=plain(call.out, range(1, len(call.out.shape))))


def _local_batch(call: OpCall, sharding: OpSharding) -> Localize | None:
    """`native_group_norm` is told the batch size."""
    if "N" not in call.arguments:
        return None
    output = as_layouts(sharding.outputs)[0]

    def local(rank: int) -> LocalCall:
        return same_call(call, N=output.local_shape(call.out.shape, rank)[0])

    return local


def _batch_norm(call: OpCall) -> Labels | str:
    """With running statistics everything is pointwise per channel."""
    if call.arguments.get("training") or call.arguments.get("running_mean") is None:
        return "batch norm over the batch's own statistics"
    channel = (1,)
    saved = (channel if spec.shape == call.out.shape[1:2] else (None,) for spec in call.results[1:])
    return by_argument(
        call,
        plain(call.out),
        *saved,
        input=plain(call.out),
        weight=channel,
        bias=channel,
        running_mean=channel,
        running_var=channel,
    )


def _instance_norm(call: OpCall) -> Labels | str:
    """Statistics per sample and channel, over what is behind."""
    if call.arguments.get("running_mean") is not None:
        return "instance norm with running statistics"
    names = plain(call.out, range(2, len(call.out.shape)))
    return by_argument(call, names, input=names, weight=(1,), bias=(1,))


RULES = {
    **rules_of(labelled(_layer_norm), aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm),
    **rules_of(labelled(_group_norm, _local_batch), aten.group_norm, aten.native_group_norm),
    **rules_of(
        labelled(_batch_norm),
        aten.batch_norm,
        aten.native_batch_norm,
        aten._native_batch_norm_legit_no_training,
    ),
    **rules_of(labelled(_instance_norm), aten.instance_norm),
}

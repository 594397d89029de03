"""Recurrent layers: samples are independent; a token needs the one before it."""

from __future__ import annotations

import torch

from xdit_ir.rules.base import OpCall, rules_of
from xdit_ir.rules.labels import Labels, Names, by_argument, labelled

aten = torch.ops.aten


def _recurrent(call: OpCall) -> Labels:
    """`[batch, tokens, width]`, or tokens first, and states `[layers, batch, width]`."""
    if len(call.specs[0].shape) != 3 or "batch_first" not in call.arguments:  # packed sequences
        return by_argument(call, *((None,) * len(spec.shape) for spec in call.results))
    tokens: Names = ("batch", None, None) if call.arguments["batch_first"] else (None, "batch", None)
    state: Names = (None, "batch", None)
    count = len(call.results)
    return by_argument(call, tokens, *[state] * (count - 1), input=tokens, hx=[state] * (count - 1))


RULES = rules_of(labelled(_recurrent), aten.gru, aten.lstm, aten.rnn_tanh, aten.rnn_relu)

"""Fourier transforms: whole along the transformed dims."""

from __future__ import annotations

import torch

from xdit_ir.rules.base import OpCall, rules_of
from xdit_ir.rules.labels import Labels, by_argument, labelled, plain

aten = torch.ops.aten


def _transform(call: OpCall) -> Labels:
    """The dims named, or those that `s` names from the right, or all."""
    ndim, arguments = len(call.out.shape), call.arguments
    dims, sizes = arguments.get("dim"), arguments.get("s")
    if isinstance(dims, int):
        dims = [dims]
    elif dims is None:
        dims = list(range(-len(sizes), 0)) if sizes is not None else list(range(ndim))
    names = plain(call.out, dims)
    return by_argument(call, names, self=names)


NAMES = [
    *(f"fft_{kind}fft{suffix}" for kind in ("", "i", "r", "ir", "h", "ih") for suffix in ("", "2", "n")),
    "fft_fftshift",
    "fft_ifftshift",
    "_fft_c2c",
    "_fft_r2c",
    "_fft_c2r",
]
RULES = rules_of(labelled(_transform), *(getattr(aten, name) for name in NAMES))

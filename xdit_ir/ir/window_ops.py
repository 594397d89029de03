"""What a rank computes of operators whose windows move along dims, where a kernel that knows its part only does not do:
each is told what of the result it makes, and what of the operand it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# An operand is padded alike on both sides, and results are dropped, rather than copied, if they are at most this part.
DROPPED = 1 / 8


def padded_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Convolution over the trailing dims with zero padding given per dim as (before, after). Kernels pad alike on both
    sides: where that adds few results these are dropped, which is less than a copy of the operand with its padding."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(stride)]
    own, rest, kept = [], [], []
    sizes = zip(x.shape[-len(stride) :], weight.shape[2:], stride, padding, dilation, strict=True)
    for size, kernel, by, (before, after), apart in sizes:
        count = (size + before + after - (kernel - 1) * apart - 1) // by + 1
        both = max(before, after)
        dropped = -(-(both - min(before, after)) // by)
        alike = min(before, after) >= 0 and (both - before) % by == 0 and dropped <= DROPPED * count
        own.append(both if alike else 0)
        rest.append((0, 0) if alike else (before, after))
        kept.append(((own[-1] - before) // by if alike else 0, count))
    flat = [amount for before_after in reversed(rest) for amount in before_after]
    padded = F.pad(x, flat) if any(flat) else x
    return _narrowed(conv(padded, weight, bias, tuple(stride), tuple(own), tuple(dilation), groups), kept)


def cut_conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    kept: Sequence[tuple[int, int]],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Transposed convolution over the trailing dims without padding, and of each dim the results `kept`, given as
    (start, length)."""
    conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(stride)]
    result = conv(x, weight, bias, tuple(stride), 0, tuple(output_padding), groups, tuple(dilation))
    return _narrowed(result, kept)


def _narrowed(x: torch.Tensor, kept: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Of the trailing dims what is `kept`, given as (start, length)."""
    for dim, (start, length) in enumerate(kept, x.ndim - len(kept)):
        x = x.narrow(dim, start, length)
    return x


def padded_pool(
    x: torch.Tensor,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    divisor: int | None,
) -> torch.Tensor:
    """Pooling ("max"; "avg", and "inner" without what is padding in the mean) over the trailing dims with padding given
    per dim as (before, after)."""
    flat = [amount for before_after in reversed(padding) for amount in before_after]
    if kind == "max":
        least = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(stride)]
        padded = F.pad(x, flat, value=least) if any(flat) else x
        return pool(padded, tuple(kernel), tuple(stride), 0, tuple(dilation))
    mean: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(stride)]
    options = {} if divisor is None else {"divisor_override": divisor}
    result: torch.Tensor = mean(F.pad(x, flat) if any(flat) else x, tuple(kernel), tuple(stride), **options)
    if kind != "inner" or divisor is not None:
        return result
    inner = F.pad(x.new_ones((1, *x.shape[-len(stride) :])), flat)
    counted: torch.Tensor = mean(inner, tuple(kernel), tuple(stride))
    return result / counted


def cut_resize(
    x: torch.Tensor,
    used: Sequence[tuple[int, int]],
    size: Sequence[int],
    kept: Sequence[tuple[int, int]],
    mode: str,
    antialias: bool,
) -> torch.Tensor:
    """Resizing of what is `used` of the trailing dims to `size`, and of each dim the results `kept`; both are given as
    (start, length)."""
    found = F.interpolate(_narrowed(x, used), tuple(size), mode=mode, antialias=antialias)
    return _narrowed(found, kept)


def overlap_add(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    kept: Sequence[tuple[int, int]],
) -> torch.Tensor:
    """The sum of overlapping windows [batch, channels * window, rows, columns], and of rows and columns of that what is
    `kept`, given as (start, length); what no window covers is zero."""
    steps = zip(x.shape[-2:], stride, kernel, dilation, strict=True)
    size = [(count - 1) * by + (reach - 1) * apart + 1 for count, by, reach, apart in steps]
    folded = F.fold(x.flatten(-2), tuple(size), tuple(kernel), tuple(dilation), 0, tuple(stride))
    lacking = [max(sum(own) - there, 0) for own, there in zip(kept, size, strict=True)]
    return _narrowed(F.pad(folded, (0, lacking[1], 0, lacking[0])) if any(lacking) else folded, kept)


def window_energy(window: torch.Tensor, frames: int, hop: int, kept: tuple[int, int]) -> torch.Tensor:
    """The squares of a window `[size]`, summed over so many frames `hop` apart, of which `kept` is what is returned,
    given as (start, length), as `[1, 1, 1, length]`. Raises where nothing is left of what was transformed."""
    squares = window.square().reshape(1, -1, 1, 1).expand(1, -1, 1, frames)
    energy = overlap_add(squares, (1, window.numel()), (1, hop), (1, 1), ((0, 1), kept))
    torch._assert_async((energy.abs() > 1e-11).all(), "istft: windows leave some samples without a value")
    return energy

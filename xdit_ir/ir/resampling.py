"""Resizing by the places of results, for parts of an image that a kernel which is told sizes only cannot resize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

# Of one dim: its length and that of the result, what lies between the places of two results, the index of the first
# element that is there, the first result to make, and how many.
Place = tuple[int, int, float, int, int, int]
Taps = tuple[torch.Tensor, list[torch.Tensor]]


def resampled(
    x: torch.Tensor, places: Sequence[Place | None], mode: str, corners: bool, filtered: bool
) -> torch.Tensor:
    """Resizing of the trailing dims ("nearest", "nearest-exact", "linear", "cubic", or "mean" of adaptive pooling),
    dims without a place left as they are; `corners`: from corner to corner; `filtered`: weighed as wide as results are
    apart."""
    dims = [(dim, place) for dim, place in enumerate(places, x.ndim - len(places)) if place is not None]
    if mode.startswith("nearest"):
        for dim, place in dims:
            x = x.index_select(dim, _nearest(place, mode == "nearest-exact", x.device))
        return x
    exact = torch.promote_types(x.dtype, torch.float32)
    result = x.to(exact)
    for dim, place in reversed(dims):
        first, weights = _means(place, x.device) if mode == "mean" else _taps(place, mode, corners, filtered, x.device)
        result = _weighted(result, dim, place, first, [weight.to(exact) for weight in weights])
    return result.to(x.dtype)


def _nearest(place: Place, exact: bool, device: torch.device) -> torch.Tensor:
    """Where each result is read, in single precision as kernels reckon."""
    size, _, step, start, first, count = place
    results = torch.arange(first, first + count, device=device, dtype=torch.float32)
    return ((results + 0.5 if exact else results) * step).floor().long().clamp(max=size - 1) - start


def _weighted(
    x: torch.Tensor, dim: int, place: Place, first: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The sum of what lies from `first` on by its weights; what is outside of the image is its edge."""
    size, _, _, start, *_ = place
    shape = [-1] + [1] * (x.ndim - 1 - dim)
    total: torch.Tensor | None = None
    for tap, weight in enumerate(weights):
        index = ((first + tap).clamp(0, size - 1) - start).clamp(0, x.shape[dim] - 1)
        term = x.index_select(dim, index) * weight.reshape(shape)
        total = term if total is None else total + term
    assert total is not None
    return total


def _results(place: Place, device: torch.device) -> torch.Tensor:
    return torch.arange(place[4], place[4] + place[5], device=device, dtype=torch.float64)


def _means(place: Place, device: torch.device) -> Taps:
    """Of adaptive pooling: all from where a result's part of the dim begins to where it ends, in equal parts."""
    size, out, *_ = place
    results = _results(place, device).long()
    first, stop = results * size // out, ((results + 1) * size + out - 1) // out
    most = max((size + out - 1) // out + 1, 1)
    return first, [((first + tap < stop) / (stop - first)).double() for tap in range(most)]


def _taps(place: Place, mode: str, corners: bool, filtered: bool, device: torch.device) -> Taps:
    _, _, step, *_ = place
    results = _results(place, device)
    if filtered:
        return _filtered(place, mode, results)
    at = results * step if corners else (results + 0.5) * step - 0.5
    at = at.clamp(min=0) if mode == "linear" else at
    first = at.floor()
    part = at - first
    if mode == "linear":
        return first.long(), [1 - part, part]
    return first.long() - 1, [_cubic(abs(part - tap), -0.75) for tap in (-1, 0, 1, 2)]


def _filtered(place: Place, mode: str, results: torch.Tensor) -> Taps:
    """What is around the centre of each result, by its distance there, with weights that add up to one."""
    size, _, step, *_ = place
    wide = max(step, 1.0)
    reach = wide * (1 if mode == "linear" else 2)
    centre = (results + 0.5) * step
    first = (centre - reach + 0.5).trunc().clamp(min=0)
    stop = (centre + reach + 0.5).trunc().clamp(max=size)
    weigh: Callable[[torch.Tensor], torch.Tensor] = _triangle if mode == "linear" else lambda x: _cubic(x, -0.5)
    taps = range(math.ceil(2 * reach) + 1)
    weights = [weigh(abs((first + tap - centre + 0.5) / wide)) * (first + tap < stop) for tap in taps]
    total = torch.stack(weights).sum(0)
    return first.long(), [weight / total for weight in weights]


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0)


def _cubic(x: torch.Tensor, a: float) -> torch.Tensor:
    """The cubic of a distance that kernels weigh by."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))

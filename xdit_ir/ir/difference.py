"""How two tensors differ: by how much, where most, and within which indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_ir.ir.layout import Layout

# An element counts as different from this share of the largest difference on: rounding elsewhere must not hide where.
SHARE = 1e-3


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative error over corresponding tensors; infinite where shapes differ or a value is not finite."""
    if len(got) != len(expected):
        return float("inf")
    return max((relative(a, b) for a, b in zip(got, expected, strict=True)), default=0.0)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected; infinite where shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    if not got.numel() or (got.dtype == expected.dtype and torch.equal(got, expected)):
        return 0.0
    a, b = _wide(got), _wide(expected)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0, a - b).norm().item()
    scale = torch.where(b.isfinite(), b, 0).norm().item()
    error = difference / scale if scale else difference
    return error if error == error else float("inf")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def shard_of(whole: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor:
    """A rank's part of a global tensor."""
    for dim, partition in enumerate(layout.dims):
        if partition is not None:
            whole = whole.index_select(dim, torch.from_numpy(partition.parts[rank].array).to(whole.device))
    return whole


@dataclass(frozen=True)
class Statistics:
    """One tensor in a line; of complex numbers their magnitudes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float
    high: float
    mean: float

    @staticmethod
    def of(x: torch.Tensor) -> Statistics:
        """The statistics of a tensor, NaN for one without elements."""
        wide = (x.abs() if x.is_complex() else x).double()
        nothing = float("nan")
        low, high, mean = (nothing,) * 3 if not x.numel() else (wide.min(), wide.max(), wide.mean())
        return Statistics(tuple(x.shape), x.dtype, float(low), float(high), float(mean))

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}{list(self.shape)}, min {self.low:.4g}, max {self.high:.4g}, mean {self.mean:.4g}"


@dataclass(frozen=True)
class Difference:
    """Two tensors that should be equal: statistics, the place where they differ most, and the extent of the error.

    `at` is an index of the whole (global) value; `extent` says for every dimension to which indices the error is
    confined, and is empty where it is everywhere.
    """

    got: Statistics
    expected: Statistics
    at: tuple[int, ...] = ()
    values: tuple[str, str] = ("", "")
    extent: str = ""

    @staticmethod
    def of(got: torch.Tensor, expected: torch.Tensor, layout: Layout, rank: int) -> Difference:
        """The difference of a rank's part, of this layout, from what it should be."""
        statistics = Statistics.of(got), Statistics.of(expected)
        if got.shape != expected.shape or not got.numel():
            return Difference(*statistics)
        size = (_wide(got) - _wide(expected)).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        place = tuple(int(i) for i in torch.unravel_index(size.argmax(), size.shape))
        wrong = size > 0 if size.max().isinf() else size >= SHARE * size.max()
        confined = [_confined(wrong, dim, layout, rank) for dim in range(wrong.dim())]
        return Difference(
            *statistics,
            tuple(int(_indices(layout, dim, size.shape[dim], rank)[i]) for dim, i in enumerate(place)),
            (f"{got[place].item():.6g}", f"{expected[place].item():.6g}"),
            ", ".join(text for text in confined if text),
        )

    def lines(self) -> list[str]:
        """The text, line by line."""
        found = [f"got      {self.got}", f"expected {self.expected}"]
        if self.values[0]:
            where = f"differ most at {list(self.at)}: {self.values[0]} instead of {self.values[1]}"
            found.append(f"{where}; wrong everywhere" if not self.extent else f"{where}; wrong only in {self.extent}")
        return found


def _indices(layout: Layout, dim: int, size: int, rank: int) -> Sequence[int]:
    """The global indices that a rank holds of a dimension."""
    partition = layout.dims[dim]
    held: Sequence[int] = range(size) if partition is None else partition.parts[rank].array.tolist()
    return held


def _confined(wrong: torch.Tensor, dim: int, layout: Layout, rank: int) -> str:
    """To which global indices of one dimension the error is confined; empty if it is in all or in most."""
    others = [d for d in range(wrong.dim()) if d != dim]
    rows = wrong.any(others) if others else wrong
    hit = rows.nonzero().flatten().tolist()
    if 2 * len(hit) > len(rows):
        return ""
    held = _indices(layout, dim, len(rows), rank)
    return f"dim {dim} at {ranges(held[i] for i in hit)} (of {ranges(held)})"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending integers as `0-7, 12, ...`; at most four runs."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:4])
    return f"{text}, ..." if len(runs) > 4 else text

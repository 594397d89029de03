"""What `split-batch` says where no batch can be divided."""

from __future__ import annotations

import pytest

import xdit_ir as xir
from xdit_ir import models


def test_packed_samples_are_refused_for_what_they_are() -> None:
    traced = xir.trace(*models.load("plain-packed-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"packed into one sequence.*use cfg=1"):
        traced.parallelize(cfg=2)


def test_too_few_samples() -> None:
    traced = xir.trace(*models.load("plain-dit:tiny"))
    with pytest.raises(xir.ParallelizeError, match=r"batch of 2: give at least 3 samples .* or use cfg=2"):
        traced.parallelize(cfg=3)

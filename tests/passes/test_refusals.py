"""What cannot be divided is refused with the nearest choice that can."""

from __future__ import annotations

import pytest

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh


@pytest.mark.parametrize(
    ("degrees", "hint"),
    [
        ({"ulyses": 2}, r"did you mean ulysses=2\?"),
        ({"rings": 4}, r"did you mean ring=4\?"),
        ({"tensor": 2}, "there are cfg, pipefusion, ring, ulysses"),
        ({"ring": 0}, "nearest legal one is ring=1"),
    ],
)
def test_degrees(degrees: dict[str, int], hint: str) -> None:
    with pytest.raises(ParallelizeError, match=hint):
        Mesh.of(**degrees)

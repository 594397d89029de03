"""A communicator without processes, for tests of code that is written and not run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace

from xdit_ir.ir.mesh import Mesh


@dataclass
class Here:
    """What code generation asks of a communicator."""

    mesh: Mesh
    rank: int = 0
    recordable: bool = True
    timeout: timedelta = timedelta(minutes=10)

    def among(self, members: tuple[int, ...], *, beside: bool = False) -> SimpleNamespace:
        return SimpleNamespace(group_name="0")

"""What runs a parallel program needs to know of it; `xdit_ir.api.ParallelProgram` is one."""

from __future__ import annotations

from typing import Protocol

from xdit_ir.caching.cut import CachedProgram
from xdit_ir.caching.decision import CacheCount
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import Program
from xdit_ir.pipefusion.pipeline_program import Pipeline


class Parallel(Protocol):
    """A program divided over a mesh of ranks: as traced, and as divided."""

    @property
    def original(self) -> Program:
        """The program as traced."""
        ...

    @property
    def ir(self) -> Program:
        """The program with layouts; under PipeFusion its mesh dim `pipefusion` counts patches."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The mesh of ranks."""
        ...

    @property
    def pipeline(self) -> Pipeline | None:
        """The stages, under PipeFusion."""
        ...

    @property
    def pair_calls(self) -> bool:
        """Whether parts of `cfg` run different calls."""
        ...

    @property
    def cache(self) -> CacheCount | None:
        """The rule of a step cache, if there is one."""
        ...

    def cached_rank(self, rank: int) -> CachedProgram:
        """The programs of one rank for a step with a cache."""
        ...

    def rank(self, rank: int) -> Program:
        """The program of one rank, with static local sizes."""
        ...

    def text(self, *, bodies: bool = False) -> str:
        """The textual form."""
        ...

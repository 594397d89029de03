"""What every port tells of its calls, be it of a module or of a method."""

from __future__ import annotations

from xdit_ir.api import ParallelProgram
from xdit_ir.porting.specialisations import Specialisations
from xdit_ir.sharding.report import Report


class ProgramsOf:
    """The programs that calls have made, and the report of the last one."""

    __slots__ = ()

    @property
    def _xdit_made(self) -> Specialisations:
        raise NotImplementedError

    @property
    def program(self) -> ParallelProgram | None:
        """The parallel program of the last call that was divided; None before the first."""
        return next(iter(self.programs), None)

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The parallel programs of all specialisations, the most recently used first."""
        return self._xdit_made.programs

    def report(self) -> Report:
        """That of the program of the last call, and how it runs on this rank.

        Raises:
            ParallelizeError: there was no call yet, or it ran whole on every rank; says why.
        """
        return self._xdit_made.report()

    def reset(self) -> None:
        """Forget all specialisations, on every rank, so that the next call traces the model anew.

        Under `cuda_graph`, call it before `torch.distributed.destroy_process_group`, which would wait for the graphs.
        """
        self._xdit_made.clear()

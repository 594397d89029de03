"""A method of a module that runs in parallel: it is put on the instance, in place of the class's own."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Mapping
from typing import Any

from xdit_ir.api import ParallelProgram
from xdit_ir.capture.methods import StandIn, as_module
from xdit_ir.emission.context import RunOptions
from xdit_ir.ir.mesh import Mesh
from xdit_ir.porting.specialisations import Arguments, Specialisations
from xdit_ir.sharding.report import Report


class PortedMethod(StandIn):
    """`vae.decode`, parallel: called like the original, which it answers for in everything else."""

    __slots__ = ("_how", "_made")

    def __init__(
        self, original: types.MethodType, mesh: Mesh, schedule: Mapping[str, Any], options: RunOptions, *, pays: bool
    ) -> None:
        super().__init__(original)
        self._how = (mesh, schedule, options, pays)
        self._made: Specialisations | None = None

    @property
    def _specialisations(self) -> Specialisations:
        """Made when first needed: a copy of a module is not complete when its methods are copied."""
        if self._made is None:
            mesh, schedule, options, pays = self._how
            self._made = Specialisations.of(as_module(self.original), mesh, schedule, options, pays=pays)
        return self._made

    @property
    def owner(self) -> Any:
        """The module on which it is put."""
        return self.original.__self__

    @property
    def name(self) -> str:
        """The name under which it is put there."""
        return self.original.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._specialisations.call(Arguments(args, kwargs))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PortedMethod:
        mesh, schedule, options, pays = self._how
        return PortedMethod(copy.deepcopy(self.original, memo), mesh, schedule, options, pays=pays)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"the port of {self.original.__qualname__} belongs to running processes and cannot be saved")

    @property
    def program(self) -> ParallelProgram | None:
        """The parallel program of the last call that was divided; None before."""
        return next(iter(self.programs), None)

    @property
    def programs(self) -> tuple[ParallelProgram, ...]:
        """The parallel programs of all specialisations, the most recently used first."""
        return self._specialisations.programs

    def report(self) -> Report:
        """That of the program of the last call, and how it runs on this rank.

        Raises:
            ParallelizeError: there was no call yet, or it ran whole on every rank; says why.
        """
        return self._specialisations.report()

    def reset(self) -> None:
        """Forget all specialisations, on every rank."""
        self._specialisations.clear()

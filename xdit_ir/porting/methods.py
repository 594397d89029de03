"""A method of a module that runs in parallel: it is put on the instance, in place of the class's own."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from xdit_ir.emission.context import RunOptions
from xdit_ir.ir.mesh import Mesh
from xdit_ir.porting.arguments import Arguments
from xdit_ir.porting.programs_of import ProgramsOf
from xdit_ir.porting.specialisations import Specialisations
from xdit_ir.reflection.methods import StandIn, as_module


class PortedMethod(ProgramsOf, StandIn):
    """`vae.decode`, parallel: called like the original, which it answers for in everything else."""

    __slots__ = ("_how", "_made", "watch")

    def __init__(
        self, original: types.MethodType, mesh: Mesh, schedule: Mapping[str, Any], options: RunOptions, *, pays: bool
    ) -> None:
        super().__init__(original)
        self._how = (mesh, schedule, options, pays)
        self._made: Specialisations | None = None
        self.watch: Callable[..., Any] | None = None  # called with the call, if someone measures it

    @property
    def _xdit_made(self) -> Specialisations:
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
        if self.watch is not None:
            return self.watch(self._call, args, kwargs)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self._xdit_made.call(Arguments(args, kwargs))

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

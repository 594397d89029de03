"""The ports of what stands beside denoisers: methods of autoencoders, and other encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from xdit_ir.capture.odd_weights import odd_weight
from xdit_ir.emission.context import RunOptions
from xdit_ir.emission.loading import Loading
from xdit_ir.emission.state import hooked
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.passes.keeping import Keeping
from xdit_ir.planning.hardware import slowest_here
from xdit_ir.porting.components import coders, takes_ids
from xdit_ir.porting.methods import PortedMethod
from xdit_ir.porting.ported import Ported
from xdit_ir.porting.worth import may_pay
from xdit_ir.sharding.machine import Machine


@dataclass(frozen=True)
class PortedParts:
    """How they are made: divided over all ranks of `mesh` by rows or tokens, one kernel after the other, as they run
    once for an image or video. If `asked` for by name, what cannot be divided is an error, else it runs whole.
    `keeping`: where encoders of texts, and others that are asked for, have their weights; what of them may stay on the
    GPU is for denoisers, which run at every step.
    """

    mesh: Mesh
    machine: Machine | None
    options: Mapping[str, RunOptions]
    keeping: Keeping
    asked: bool

    def methods(self, modules: Mapping[str, nn.Module]) -> list[PortedMethod]:
        """Those of autoencoders."""
        made = []
        for name, module in {id(module): (name, module) for name, module in modules.items()}.values():
            found = coders(module) if self._may(name, module) else {}
            made += [PortedMethod(method, *self._how(name, module), pays=not self.asked) for method in found.values()]
        return made

    def encoders(self, modules: Mapping[str, nn.Module]) -> dict[str, Ported]:
        """Other modules that are asked for, or so large that dividing them may pay, or whose weights are divided."""
        made = {}
        for name, module in modules.items():
            kept = self._kept(module)
            if not (kept or self._may(name, module)) or coders(module):
                continue
            if kept or self.asked or may_pay(module, self.machine or slowest_here()):
                made[name] = Ported(module, *self._how(name, module, kept=kept), pays=not self.asked)
        return made

    def _kept(self, module: nn.Module) -> bool:
        """Whether an encoder's weights are divided over ranks, or lie with the host."""
        wanted = (self.asked or takes_ids(module)) and self.keeping.everywhere.gives_up(self._everyone)
        return wanted and not_portable(module) is None

    @property
    def _everyone(self) -> Mesh:
        return Mesh.of(ulysses=self.mesh.world_size)

    def _may(self, name: str, module: nn.Module) -> bool:
        """Whether a module can be ported; raises `ParallelizeError` if one that is asked for cannot."""
        reason = not_portable(module)
        if self.asked and reason is not None:
            raise ParallelizeError(reason)
        held_here = self._options(name, module).loading.holds  # then the original has no weights to run whole with
        return self.asked or (reason is None and not held_here and self.mesh.world_size > 1)

    def _options(self, name: str, module: nn.Module) -> RunOptions:
        """Those for a module: what is not asked for and has its weights needs none from elsewhere."""
        given = self.options[name]
        whole = not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        spared = whole and not self.asked and not given.loading.release
        return replace(given, loading=Loading()) if spared else given

    def _how(self, name: str, module: nn.Module, *, kept: bool = False) -> tuple[Mesh, dict[str, Any], RunOptions]:
        mesh, given = self._everyone, self._options(name, module)
        schedule: dict[str, object] = {**mesh.degrees, "patches": None, "warmup_steps": 1, "machine": self.machine}
        if kept:
            schedule |= self.keeping.everywhere.options
            given = given if given.loading.holds else replace(given, loading=Loading(release=True))
        mode = "eager" if given.execution.mode == "auto" else given.execution.mode
        return mesh, schedule, replace(given, execution=replace(given.execution, mode=mode))


def not_portable(module: nn.Module) -> str | None:
    """Why a module cannot be ported; None if it can."""
    if isinstance(module, Ported):
        return "the module is ported already; its original is needed to port it otherwise"
    if (where := hooked(module)) is not None:
        return f"{where} has a hook of accelerate, which offloads or spreads weights: port first"
    return odd_weight(module)

"""The ladder of fallbacks: what is given up, step by step, where a model cannot be captured as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from xdit_ir.capture.failures import Opaque, Repeated, Restart, ShapeDepends, Spot, Unshareable
from xdit_ir.capture.leaves import Reasons, Wanted, like, named_leaves
from xdit_ir.capture.source import failing_line
from xdit_ir.errors import TraceError
from xdit_ir.reflection.tree import modules_of, named_modules_of

FAILURES = (Restart, Repeated, Opaque, ShapeDepends, Unshareable)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Rung:
    """What one attempt at a capture takes as blocks, and what as leaves, which are called whole (why, by path).
    `selects`: all rows are computed of what masks select; None: not yet tried. `repeated` are calls that become blocks
    because there are several alike, but for those that `never` can."""

    model: nn.Module
    blocks: dict[str, nn.Module]
    leaves: Reasons
    selects: bool | None = None
    repeated: frozenset[Spot] = frozenset()
    never: frozenset[Spot] = frozenset()

    @staticmethod
    def top(model: nn.Module, leaf: Sequence[Wanted], learnt: Rung | None = None) -> Rung:
        """Every block that there may be, and only those leaves that were asked for; calls that repeat as `learnt`."""
        top = Rung(model, candidates(model), named_leaves(model, leaf))
        return top if learnt is None else replace(top, repeated=learnt.repeated, never=learnt.never)

    def below(self, failure: BaseException) -> Rung:
        """What to try after one of the `FAILURES`.

        Raises:
            TraceError: there is nothing to give up that would help.
        """
        match failure:
            case Repeated(spot=spot):
                return replace(self, repeated=self.repeated | {spot})
            case Restart(spot=spot) if spot not in {(path, "forward") for path in self.blocks}:
                return replace(self, repeated=self.repeated - {spot}, never=self.never | {spot})
            case Restart(path=path):
                return self._without_blocks_like(path)
            case Opaque(path=path, selects=True) if self.selects is None and self._is_most(path):
                return replace(self, selects=True)
            case Opaque(path=path) if path and path not in self.leaves:
                return replace(self, leaves=self.leaves | dict.fromkeys(like(self.model, path), str(failure)))
            case ShapeDepends(path=path):
                return self._with_parents_as_leaves(path)
            case Unshareable() if self.repeated:
                return replace(self, repeated=frozenset(), never=self.never | self.repeated)
            case Unshareable() if self.blocks:
                return replace(self, blocks={})
            case TraceError():
                raise failure
        raise TraceError(f"{failing_line(failure)}: {failure}") from failure

    def _is_most(self, path: str) -> bool:
        """Whether a module is too much of the model to be called whole."""
        own, every = (sum(x.numel() for x in one.parameters()) for one in (self.model.get_submodule(path), self.model))
        return not path or 2 * own > every

    def _without_blocks_like(self, path: str) -> Rung:
        kind = type(self.blocks[path])
        kept = {name: one for name, one in self.blocks.items() if type(one) is not kind}
        return replace(self, blocks=kept, never=self.never | {(name, "forward") for name in self.blocks.keys() - kept})

    def _with_parents_as_leaves(self, path: str) -> Rung:
        """For leaves that cannot be leaves themselves, since the shape of what they return is not known."""
        failed = like(self.model, path)
        reason = f"{self.leaves[path]}; its result has another shape for other contents"
        parents = {name.rpartition(".")[0] for name in failed}
        while "" not in parents and any(isinstance(self.model.get_submodule(one), _CONTAINERS) for one in parents):
            parents = {name.rpartition(".")[0] for name in parents}
        if "" in parents:
            raise TraceError(reason)
        kept = {name: why for name, why in self.leaves.items() if name not in failed}
        return replace(self, leaves=kept | dict.fromkeys(parents, reason))


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may become blocks, by path: with children of their own, and siblings of their class."""
    chosen: set[int] = set()
    for parent in modules_of(model):
        children = [child for child in parent._modules.values() if child is not None and child._modules]
        enough = 2 if isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else 3
        kinds = [type(child) for child in children]
        chosen |= {id(child) for child in children if kinds.count(type(child)) >= enough}
    return {path: module for path, module in named_modules_of(model) if id(module) in chosen}

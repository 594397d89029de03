"""Wrappers around the methods of the copied modules, which say what becomes of their calls while they are traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.failures import Spot
from xdit_ir.capture.leaves import Leaves
from xdit_ir.capture.marks import Marks
from xdit_ir.capture.odd_weights import applied
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.repeats import Repeats, methods_of
from xdit_ir.capture.skeleton import Skeleton
from xdit_ir.reflection.fingerprint import TRACED, traced


@dataclass(frozen=True)
class Calls:
    """What becomes of the calls of modules."""

    recorder: Recorder
    blocks: Blocks
    leaves: Leaves
    repeats: Repeats
    marks: Marks

    def forward(self, module: nn.Module, path: str, names: list[str], forward: Any) -> Any:
        """A copied module's forward, watched."""
        recorder = self.recorder

        def recorded(*args: Any, **kwargs: Any) -> Any:
            inside = recorder.relative(names)
            recorder.path.append(path if inside is None else inside)
            try:
                return forward(*args, **kwargs)
            finally:
                recorder.path.pop()

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.leaves.wants(path):
                output = self._call(module, (path, "forward"), forward, recorded, args, kwargs)
                return self.marks.on(path, output)
            self.marks.check_whole(path)
            if self._selected(args, kwargs):
                raise recorder.opaque(f"{path} is called whole, with rows that a mask selects")
            return self.leaves.call(path, module, args, kwargs)

        setattr(wrapped, TRACED, forward)
        return wrapped

    def method(self, module: nn.Module, path: str, method: MethodType) -> Any:
        """Another method of a copied module, watched."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._call(module, (path, method.__name__), method, method, args, kwargs)

        setattr(wrapped, TRACED, method)
        return wrapped

    def _call(self, module: nn.Module, spot: Spot, function: Any, recorded: Any, args: Any, kwargs: Any) -> Any:
        """As a block, or as it is `recorded`."""
        if self._selected(args, kwargs):
            return recorded(*args, **kwargs)
        if self.repeats.wants(spot):
            return self.blocks.call(module, spot, function, args, kwargs)
        return self.repeats.call(module, spot, function, recorded, args, kwargs)

    def _selected(self, args: Any, kwargs: Any) -> bool:
        selections = self.recorder.selections
        return selections is not None and bool(selections.of((args, kwargs)))


def instrument(skeleton: Skeleton, calls: Calls) -> None:
    """Wrap every copied module's forward, so that paths are known and blocks are intercepted; of the module that holds
    the others the other methods too."""
    for path, module in skeleton.modules.items():
        module.__dict__["_apply"] = guard = applied(path, module, calls.recorder.casts)
        setattr(guard, TRACED, type(module)._apply)
        if isinstance(module, nn.RNNBase):
            module.__dict__["_weights_have_changed"] = unchanged = _never()
            setattr(unchanged, TRACED, type(module)._weights_have_changed)
        forward = module.forward
        if getattr(forward, "__name__", "") != "_forward_unimplemented":
            names = skeleton.aliases[id(module)]
            module.__dict__["forward"] = calls.forward(module, path, names, forward)
    root = traced(skeleton.model.forward)
    owner: Any = root.__self__ if isinstance(root, MethodType) else skeleton.model
    for name, method in methods_of(owner).items() if isinstance(owner, nn.Module) else ():
        owner.__dict__[name] = calls.method(owner, "", method)


def _never() -> Callable[[], bool]:
    """Says whether weights of a copy have changed, which keeps the original's."""
    return lambda: False

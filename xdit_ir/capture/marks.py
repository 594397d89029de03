"""What chosen modules return, marked as what a later step may reuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xdit_ir.capture.leaves import names_below
from xdit_ir.capture.outputs import flatten_output, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.values import spec_of
from xdit_ir.errors import StateError
from xdit_ir.ir import ops
from xdit_ir.ir.program import Where


class Marks:
    """Modules by path, each with the group of its results."""

    def __init__(self, recorder: Recorder, groups: Mapping[str, int]) -> None:
        self._recorder, self._groups = recorder, groups
        self._seen: set[tuple[int, str]] = set()

    def below(self, path: str) -> frozenset[tuple[str, int]]:
        """The marked modules of a module, relative to it."""
        return frozenset((relative, self._groups[name]) for relative, name in names_below(self._groups, path))

    def check_whole(self, path: str) -> None:
        """Raise `StateError` if a module that is not looked into has or is a marked one."""
        if path in self._groups or self.below(path):
            raise StateError(
                f"{path} is called whole, and a step cache reuses what it returns, or a module in it; expected one "
                "that can be captured, nearest legal: disable_cache()"
            )

    def on(self, path: str, output: Any) -> Any:
        """What a module has returned, marked if it is one of those."""
        if path not in self._groups:
            return output
        call = (id(self._recorder.frame), path)  # frames live as long as the trace
        if call in self._seen:
            raise StateError(
                f"forward calls {path} more than once, and a step cache reuses what it returns; expected one call, "
                "nearest legal: disable_cache()"
            )
        self._seen.add(call)
        leaves, spec = flatten_output(output)
        with self._recorder.recording(False):
            return unflatten_output([self._marked(path, leaf) for leaf in leaves], spec)

    def _marked(self, path: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        recorder = self._recorder
        prefix = recorder.frame.prefix
        where = Where(path.removeprefix(f"{prefix}.") if prefix else path, recorder.where().source)
        value, kwargs = recorder.value(leaf), {"group": self._groups[path]} if self._groups[path] else {}
        node = recorder.emit("call_function", ops.reuse, (recorder.node(leaf),), kwargs, spec_of(leaf), where, "reuse")
        made = recorder.blank(value.fake)
        recorder.bind(made, node, None, value.roots)
        return made

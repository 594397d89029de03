"""Calls that repeat, such as the decoder of one tile, or the method that blends two: found while they are recorded, so
that the next attempt takes them as blocks, which are traced once for all calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.calls import SubmoduleCall, describe_call
from xdit_ir.capture.failures import Repeated, Spot, Unshareable
from xdit_ir.capture.left import left_behind
from xdit_ir.capture.recorder import Recorder
from xdit_ir.ir.program import called_block, is_block_call

# Operators that a call must have for a block of its own.
LONG = 100


class Repeats:
    """Watches the calls of one attempt. `found`: those that are blocks in it because they repeat, of which there were
    `blocks` calls; `never`: those that cannot be."""

    def __init__(self, recorder: Recorder, blocks: Blocks, found: frozenset[Spot], never: frozenset[Spot]) -> None:
        self.recorder, self.found, self.blocks = recorder, found, 0
        self._bodies = blocks.bodies
        self._not, self._seen = set(never), set[Any]()

    def call(self, spot: Spot, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a call that is recorded as it is; raises `Repeated` at the second of two long ones alike."""
        recorder = self.recorder
        if spot in self._not or recorder.frame.parent is not None or not recorder.active or recorder.selections:
            return forward(*args, **kwargs)
        try:
            with recorder.recording(False):
                call = describe_call(recorder, forward, args, kwargs)
        except Unshareable:
            self._not.add(spot)
            return forward(*args, **kwargs)
        if (spot, call.key) in self._seen:
            raise Repeated(spot)
        nodes, blocks = len(recorder.frame.graph.nodes), self.blocks
        output = forward(*args, **kwargs)
        if self._length(nodes) >= LONG and blocks == self.blocks and _leaves_in_lists(call, args, kwargs):
            self._seen.add((spot, call.key))
        else:
            self._not.add(spot)
        return output

    def _length(self, before: int) -> int:
        """The operators that were recorded since the graph had so many, those in blocks too."""
        graph = self.recorder.frame.graph
        sizes = {body.name: len(body.frame.graph.nodes) for body in self._bodies}
        new = islice(reversed(graph.nodes), len(graph.nodes) - before)
        return sum(sizes[called_block(node)] if is_block_call(node) else 1 for node in new)


def _leaves_in_lists(call: SubmoduleCall, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call has left nothing in what it was given, but in lists."""
    try:
        left_behind(call.leaves, call.spec, (args, dict(kwargs)))
    except Unshareable:
        return False
    return True


def methods_of(module: nn.Module) -> dict[str, MethodType]:
    """What is called on a module beside its forward: the functions of its classes."""
    kinds = type(module).__mro__
    found = {name: item for kind in reversed(kinds[: kinds.index(nn.Module)]) for name, item in vars(kind).items()}
    taken = vars(nn.Module).keys() | vars(module).keys()
    return {
        name: MethodType(item, module)
        for name, item in found.items()
        if isinstance(item, FunctionType) and name not in taken and not name.startswith("__")
    }

"""Calls that repeat, such as the decoder of one tile, or the method that blends two: found while they are recorded, so
that the next attempt takes them as blocks, which are traced once for all calls that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

from torch import fx, nn

from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.calls import SubmoduleCall, describe_call
from xdit_ir.capture.failures import Repeated, Spot, Unshareable
from xdit_ir.capture.list_effects import left_behind
from xdit_ir.capture.recorder import Recorder
from xdit_ir.ir.flops import node_flops
from xdit_ir.ir.program import called_block, is_block_call

# Operators that a call must have for a block of its own.
LONG = 100


class Repeats:
    """Watches the calls of one attempt. `found`: those that are blocks in it because they repeat; `late`: those that
    are from their second call on, since the first one had no FLOPs; `never`: those that cannot be."""

    def __init__(self, recorder: Recorder, blocks: Blocks, found: frozenset[Spot], never: frozenset[Spot]) -> None:
        self.recorder, self.found, self.late = recorder, found, set[Spot]()
        self._blocks, self._count = blocks, 0  # of calls that are blocks
        self._not, self._seen = set(never), dict[Any, bool]()  # and whether they have FLOPs

    def wants(self, spot: Spot) -> bool:
        """Whether a call is to be a block."""
        wanted = self._blocks.wants(spot)
        self._count += wanted and (spot in self.found or spot in self.late)
        return wanted

    def call(
        self, module: nn.Module, spot: Spot, function: Any, recorded: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """The result of a call that is `recorded` as it is, or, if it is the second of two long ones alike without
        FLOPs, of a block; raises `Repeated` at the second one with some."""
        recorder = self.recorder
        if spot in self._not or recorder.frame.parent is not None or not recorder.active or recorder.selections:
            return recorded(*args, **kwargs)
        try:
            with recorder.recording(False):
                call = describe_call(recorder, recorded, args, kwargs)
        except Unshareable:
            self._not.add(spot)
            return recorded(*args, **kwargs)
        if (spot, call.key) in self._seen:
            if self._seen[spot, call.key]:
                raise Repeated(spot)
            self.late.add(spot)
            self._blocks.chosen.add(spot)
            if self.wants(spot):
                return self._blocks.call(module, spot, function, args, kwargs)
        nodes, blocks = len(recorder.frame.graph.nodes), self._count
        output = recorded(*args, **kwargs)
        new = self._since(nodes)
        if len(new) >= LONG and blocks == self._count and _leaves_in_lists(call, args, kwargs):
            self._seen[spot, call.key] = any(map(node_flops, new))
        else:
            self._not.add(spot)
        return output

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What cannot be shared inside is tried again with the late blocks as blocks from the first call on."""
        try:
            yield
        except Unshareable as failure:
            for spot in self.late:
                raise Repeated(spot) from failure
            raise

    def _since(self, before: int) -> list[fx.Node]:
        """The operators that were recorded since the graph had so many, those in blocks too."""
        graph = self.recorder.frame.graph
        bodies = {body.name: body.frame.graph for body in self._blocks.bodies}
        new = islice(reversed(graph.nodes), len(graph.nodes) - before)
        return [one for node in new for one in (bodies[called_block(node)].nodes if is_block_call(node) else [node])]


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

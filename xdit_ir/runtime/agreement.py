"""What all ranks agree on before a call of a module: which one it is, its inputs, and the weights."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from xdit_ir.emission.execution import Tensors
from xdit_ir.runtime.rank_runner import RankRunner
from xdit_ir.transport.contents import Contents, Seen
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.handshake import WEIGHTS, Facts, agree, agree_contents

# Of an output's norm: what kernels change that sum in another order, as a compiler may choose on another rank.
HALF, SINGLE = 3e-2, 3e-4
ROOM, MOST = 2**19, 64  # elements and number of weights that are read again in a call on the CPU; on GPUs one weight


@dataclass(eq=False)
class Agreement:
    """That of one module, `compiled` or not; remembers which weights and inputs were looked at already."""

    communicator: Communicator
    compiled: bool = False
    _inputs: dict[str, Seen] = field(default_factory=dict)
    _weights: dict[str, Seen] = field(default_factory=dict)
    _turn: int = 0
    _stamps: weakref.WeakKeyDictionary[RankRunner, WeightStamp] = field(default_factory=weakref.WeakKeyDictionary)

    def call(self, runner: RankRunner, inputs: Tensors, weights: Tensors, details: Callable[[], Facts]) -> None:
        """Return once all ranks make this call, or are known to have made the one before.

        Raises:
            MismatchError: on all ranks, if they do not, or hold other numbers.
        """
        if self.communicator.line is None:
            return
        stamp = self._stamps.get(runner)
        names, tensors = runner.held(weights)
        changed = stamp is None or not stamp.holds(tensors)
        mine, later = runner.vote(inputs)
        told = {WEIGHTS: "changed since they were compared"} if changed else {WEIGHTS: "as compared"}
        again = {} if changed else self._some(names, tensors)
        rounding = stamp.rounding if stamp is not None and self.compiled else 0.0
        contents = Contents(runner.plain(inputs), self._inputs, again, rounding)
        later = later and not changed

        def facts() -> Facts:
            return {**details(), **runner.told(inputs), **told}

        if agree(self.communicator, mine, facts, later=later, contents=contents, new=changed):
            self.weights(runner, weights)

    def _some(self, names: Sequence[str], tensors: Tensors) -> dict[str, torch.Tensor]:
        """A few weights, others in each call, in turn: what is written through `.data` shows no other way."""
        found: dict[str, torch.Tensor] = {}
        room = ROOM if self.communicator.device.type == "cpu" else 0
        for _ in names:
            at = self._turn % len(names)
            room -= tensors[at].numel()
            if found and (room < 0 or len(found) == MOST or names[at] in found):
                break
            found[names[at]] = tensors[at]
            self._turn += 1
        return found

    def weights(self, runner: RankRunner, weights: Tensors) -> None:
        """Make sure that all ranks have the same; those that were compared before are not read again."""
        if self.communicator.line is None:
            return
        names, tensors = runner.held(weights)
        agree_contents(self.communicator, dict(zip(names, tensors, strict=True)), self._weights)
        self._stamps[runner] = WeightStamp(tensors)


class WeightStamp:
    """Tells whether tensors are the same ones, and were not written to."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [weakref.ref(x) for x in tensors]
        self.rounding = HALF if any(x.is_floating_point() and x.itemsize < 4 for x in tensors) else SINGLE
        self._versions = versions(tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether they are as they were."""
        same = all(map(operator.is_, [ref() for ref in self._tensors], tensors))
        return same and versions(tensors) == self._versions


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Count writes to tensors, where PyTorch does."""
    try:
        return [x._version for x in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [-1 if x.is_inference() else x._version for x in tensors]

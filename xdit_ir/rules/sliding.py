"""The one rule of all operators with windows: parts of an image are extended by a halo where windows reach over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xdit_ir.ir.layout import Layout
from xdit_ir.ir.partition import Indices
from xdit_ir.rules.base import LocalCall, OpCall, OpSharding, Rule, dims_whole, verified, whole
from xdit_ir.rules.intervals import Interval, Window
from xdit_ir.rules.labels import handle_empty_parts

Windows = Mapping[int, Window]


@dataclass(frozen=True)
class Held:
    """What a rank has of a dim along which windows move, and the results that it makes."""

    window: Window
    held: Indices
    made: Indices

    @property
    def border(self) -> Interval:
        """Padding to add before and after (negative: elements to drop); none to blocks that are adjacent."""
        return self.window.border(self.held, self.made) if len(self.held.runs) == 1 else (0, 0)

    @property
    def used(self) -> Interval:
        """What to take of what is held, as start and length."""
        usable = self.window.usable(self.held)
        return usable.runs[0][0] - self.held.runs[0][0], usable.size

    def kept(self, stride: int, padding: int) -> Interval:
        """Where elements add to the results from `stride` times their index less `padding` on: of those that what is
        held adds to, which are made, as start and length."""
        if len(self.held.runs) != 1:  # every element makes results of its own
            return 0, self.made.size
        (start, _), (first, length) = self.held.runs[0], self.made.runs[0]
        return first - (start * stride - padding), length


Localized = Callable[[OpCall, list[Held]], LocalCall]


def windowed(describe: Callable[[OpCall], Windows], local: Localized, *, mixes: bool = False) -> Rule:
    """The rule of an operator whose windows move along dims of its first operand as `describe` says; other operands are
    whole, and so are channels if the operator `mixes` them. `local` makes a rank's call of what it has of each dim."""

    def forward(call: OpCall) -> OpSharding:
        windows = describe(call)
        taken = output = dims_whole(call, 0, [min(windows) - 1] if mixes else [])
        for dim, window in windows.items():
            partition = taken.dims[dim]
            if partition is not None:
                needs, gives = window.divide(call.mesh, partition) or (None, None)
                taken, output = taken.with_dims({dim: needs}), output.with_dims({dim: gives})
        inputs = (taken, *whole(call.specs[1:]))
        if not any(output.dims[dim] for dim in windows):
            return handle_empty_parts(call, OpSharding(inputs, output))
        return handle_empty_parts(
            call, OpSharding(inputs, output, lambda rank: local(call, _held(windows, taken, output, rank)))
        )

    def demand(call: OpCall, wanted: Layout) -> tuple[Layout, ...] | None:
        windows = describe(call)
        if mixes and wanted.dims[min(windows) - 1] is not None:
            return None
        divided = {dim: partition for dim in windows if (partition := wanted.dims[dim]) is not None}
        changes = {dim: windows[dim].demand(partition) for dim, partition in divided.items()}
        return None if None in changes.values() else (wanted.with_dims(changes), *whole(call.specs[1:]))

    return verified(Rule(forward, demand))


def _held(windows: Windows, taken: Layout, output: Layout, rank: int) -> list[Held]:
    found = []
    for dim, window in windows.items():
        held, made = taken.dims[dim], output.dims[dim]
        part = Indices.range(0, window.size) if held is None else held.parts[rank]
        out = Indices.range(0, window.out) if made is None else made.parts[rank]
        found.append(Held(window, part, out))
    return found


def per_dim(value: int | Sequence[int], count: int) -> list[int]:
    """An argument that may be one number for all dims."""
    every = [value] if isinstance(value, int) else list(value)
    return every * count if len(every) == 1 else every

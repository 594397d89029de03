"""One way to use some GPUs for a model: what it takes, and why it is not the best."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from xdit_ir.degrees import Degrees
from xdit_ir.passes.keeping import Keeping
from xdit_ir.planning.estimate import Breakdown

PARTS = tuple(field.name for field in dataclasses.fields(Breakdown))
HEADER = ("degrees", "ms", "a second", *PARTS, "GiB", "weights", "exact", "between nodes", "why not")
TEXT = ("degrees", "between nodes", "why not")
BEST = "best"
# It exchanges what whole weights do, and more, so that no time can be less: it need not be worked out.
WHOLE = "whole weights fit, and gathering parts takes no less"


@dataclass(frozen=True)
class Candidate:
    """One way to use the GPUs: as `data` replicas of `degrees`, with weights in parts if `shard_weights`, or with the
    host (`stream_weights`: True, or bytes that stay on the GPU); milliseconds of a step (under PipeFusion of a
    displaced one) and their parts, GiB and GiB of weights of each rank of a replica; the mesh dims `between` nodes.
    `why` it is not the best; empty for that.

    `parts` are there where the divided program was worked out; of the others, `ms` follows from that of one GPU.
    Neither is there where it is illegal.
    """

    degrees: Degrees
    why: str
    ms: float | None = None
    parts: Breakdown | None = None
    gib: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    data: int = 1
    shard_weights: bool = False
    between: tuple[str, ...] = ()
    stream_weights: bool | int = False

    @property
    def name(self) -> str:
        """In short, such as `u8`, `u8 sharded`, `u1 streamed but 20.0 GiB` and `2 x u4`."""
        degrees = f"{self.degrees} sharded" if self.shard_weights else str(self.degrees)
        if self.stream_weights:
            stays = self.keeping.resident
            degrees = f"{degrees} streamed but {stays / 2**30:.1f} GiB" if stays else f"{degrees} streamed"
        return degrees if self.data == 1 else f"{self.data} x {degrees}"

    @property
    def keeping(self) -> Keeping:
        """Where weights are."""
        return Keeping.of(self.shard_weights, self.stream_weights)

    @property
    def exact(self) -> bool:
        """Whether all ranks compute what one would."""
        return self.degrees.mesh.degrees["pipefusion"] == 1

    @property
    def legal(self) -> bool:
        """Whether the model can be divided so, as far as is known."""
        return self.ms is not None

    @property
    def a_second(self) -> float:
        """Steps that all replicas make together."""
        return self.data * 1e3 / self.ms if self.ms else 0.0

    def row(self) -> tuple[str, ...]:
        """As text, in the order of `HEADER`."""
        parts, rough = self.parts, "" if self.parts else "~"
        times = ("",) * len(PARTS) if parts is None else tuple(f"{value:.1f}" for value in dataclasses.astuple(parts))
        ms = "" if self.ms is None else f"{self.ms:.1f}" if parts else f"~{self.ms:.0f}"
        rate = f"{rough}{self.a_second:.{0 if self.a_second >= 10 else 1}f}" if self.ms else ""
        sizes = (f"{max(each):.1f}" if each else "" for each in (self.gib, self.weights))
        exact, between = "yes" if self.exact else "no", ", ".join(self.between)
        return (self.name, ms, rate, *times, *sizes, exact, between, self.why or BEST)


def slower(one: Candidate, best: Candidate, times: float) -> str:
    """Why a candidate is behind the best, by the part that it loses most in."""
    if one.parts is None or best.parts is None:
        return f"about {times:.2f} times as long by sizes alone"
    ours, theirs = dataclasses.astuple(one.parts), dataclasses.astuple(best.parts)
    lost, name = max((a - b, name) for a, b, name in zip(ours, theirs, PARTS, strict=True))
    return f"{times:.2f} times as long; {name} {lost:+.1f} ms"

"""What a parallel program may cost at most, for test suites and CI servers."""

from __future__ import annotations

from dataclasses import dataclass

from xdit_ir.errors import XditError
from xdit_ir.sharding.report import Report

NAMED = 3


@dataclass(frozen=True)
class Limits:
    """The largest part of a forward's FLOPs that the slowest rank may do, and the largest number of fallbacks.

    Raises:
        XditError: a limit that no report could meet, or that every report meets.
    """

    max_share: float | None = None
    max_fallbacks: int | None = None

    def __post_init__(self) -> None:
        share, fallbacks = self.max_share, self.max_fallbacks
        if share is not None and (isinstance(share, bool) or not 0 < share <= 1):
            raise XditError(f"max_share={share!r} is no part of a forward; give a number up to 1, such as 0.55")
        if fallbacks is not None and (isinstance(fallbacks, bool) or not isinstance(fallbacks, int) or fallbacks < 0):
            raise XditError(f"max_fallbacks={fallbacks!r} is no number of fallbacks; the smallest is 0")

    def exceeded(self, report: Report) -> tuple[str, ...]:
        """What is above a limit, and which regions or fallbacks are to blame; one text for each limit."""
        found = []
        if self.max_share is not None and report.share > self.max_share:
            regions = report.uneven[:NAMED]
            parts = [f"{one.share:.4f} of {one.name} ({report.part(one.flops_total)} of all FLOPs)" for one in regions]
            limit = f"above {self.max_share} ({report.fair_share:.4f} is fair)"
            found.append("\n  ".join([f"the slowest rank does {report.share:.4f} of the FLOPs, {limit}", *parts]))
        if self.max_fallbacks is not None and len(report.fallbacks) > self.max_fallbacks:
            listed = [f"{one.op}, {one.place}: {report.reason(one)}" for one in report.fallbacks]
            found.append("\n  ".join([f"fallbacks: {len(listed)}, above {self.max_fallbacks}", *listed]))
        return tuple(found)

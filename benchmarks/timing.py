"""Processor time of calls, for benchmarks of what the host does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def quartiles(call: Callable[[], object], calls: int, unit: float) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of so many calls, of this thread, in units of so many nanoseconds."""
    times = []
    for _ in range(calls):
        start = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - start) / unit)
    lower, median, upper = statistics.quantiles(times, n=4)
    return lower, median, upper

"""The schedule in the format of Chrome's trace viewer and of Perfetto (https://ui.perfetto.dev)."""

from __future__ import annotations

import json
from typing import Any

from xdit_ir.errors import XditError
from xdit_ir.inspection.model import Inspection
from xdit_ir.planning.spans import Span

LANES = {"compute": 0, "link": 1}


def trace_text(inspection: Inspection) -> str:
    """One complete event for each span, a process for each rank.

    Raises:
        XditError: nothing is divided, so there is no schedule.
    """
    if inspection.timeline is None:
        raise XditError("a schedule needs ranks; give a degree, such as --ulysses 2")
    events: list[dict[str, Any]] = []
    for rank in range(len(inspection.timeline.busy)):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for lane, number in LANES.items():
            events.append({"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": lane}})
    events += [_event(span) for span in inspection.timeline.spans]
    about = {"model": inspection.model, "degrees": inspection.degrees, "note": inspection.timeline.note}
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def _event(span: Span) -> dict[str, Any]:
    known = {"stage": span.stage, "patch": span.patch, "step": span.step, "bytes": span.bytes}
    name = f"patch {span.patch}: {span.name}" if span.patch >= 0 and span.lane == "compute" else span.name
    return {
        "ph": "X",
        "pid": span.rank,
        "tid": LANES[span.lane],
        "name": name,
        "cat": span.kind,
        "ts": span.start,
        "dur": round(span.end - span.start, 3),
        "args": {key: value for key, value in known.items() if value >= 0},
    }

"""An inspection as JSON."""

from __future__ import annotations

import dataclasses
import json

from xdit_ir.inspection.model import Inspection


def json_text(inspection: Inspection) -> str:
    """One object; its fields are those of `xdit_ir.inspection.model.Inspection`."""
    return json.dumps(dataclasses.asdict(inspection), separators=(",", ":"))

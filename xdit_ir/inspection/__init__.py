"""A program to look at: `inspect` gathers plain data, `WRITERS` turn it into what is asked for."""

from xdit_ir.inspection.collect import inspect
from xdit_ir.inspection.dot import dot_text
from xdit_ir.inspection.html import html_text
from xdit_ir.inspection.json import json_text
from xdit_ir.inspection.model import Inspection
from xdit_ir.inspection.svg import svg_text
from xdit_ir.inspection.trace import trace_text

WRITERS = {"html": html_text, "json": json_text, "dot": dot_text, "svg": svg_text, "trace": trace_text}

__all__ = ["WRITERS", "Inspection", "inspect"]

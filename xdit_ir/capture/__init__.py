"""Capture: from a PyTorch module and an example to a `Program`, and from calls to a program's inputs and outputs."""

from xdit_ir.capture.inputs import build_output
from xdit_ir.capture.trace import trace

__all__ = ["build_output", "trace"]

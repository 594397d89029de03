"""Capture: from a module and an example to a `Program`; from calls to a program's inputs and outputs."""

from xdit_ir.capture.binder import InputBinder, bind_inputs
from xdit_ir.capture.effects import apply_effects
from xdit_ir.capture.outputs import build_output
from xdit_ir.capture.trace import trace

__all__ = ["InputBinder", "apply_effects", "bind_inputs", "build_output", "trace"]

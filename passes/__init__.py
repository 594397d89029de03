"""Passes over programs, one a file; the order is `xdit_ir.pipeline.passes_for`."""

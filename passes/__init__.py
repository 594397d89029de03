"""Passes over programs, one a file; the order is `xdit_ir.passes.order.passes_for`."""

"""Passes over programs, one a file; `xdit_ir.passes.order` lists them in their order."""

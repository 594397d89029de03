"""Whole pipelines as users run them: from a folder to files, on one process or on all of a job."""

from xdit_ir.generation.generate import Generation, generate

__all__ = ["Generation", "generate"]

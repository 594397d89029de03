"""xdit-ir: port a diffusion transformer to several GPUs with one trace call."""

from xdit_ir.api import ParallelProgram, TracedProgram, trace
from xdit_ir.checking.check import check
from xdit_ir.errors import (
    GenerationError,
    GradientError,
    LostError,
    MismatchError,
    ParallelizeError,
    TraceError,
    VerifyError,
    XditError,
)
from xdit_ir.generation import Generation, generate
from xdit_ir.planning.plan import Plan
from xdit_ir.planning.planner import plan
from xdit_ir.porting.port import port
from xdit_ir.porting.replicas import replica
from xdit_ir.rules.declared import register_rule
from xdit_ir.sharding.machine import Machine
from xdit_ir.sharding.report import Report
from xdit_ir.transport.replicas import Replica

__all__ = [
    "Generation",
    "GenerationError",
    "GradientError",
    "LostError",
    "Machine",
    "MismatchError",
    "ParallelProgram",
    "ParallelizeError",
    "Plan",
    "Replica",
    "Report",
    "TraceError",
    "TracedProgram",
    "VerifyError",
    "XditError",
    "check",
    "generate",
    "plan",
    "port",
    "register_rule",
    "replica",
    "trace",
]

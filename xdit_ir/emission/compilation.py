"""Bodies, compiled: each structure once, where it can be, else each body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.mutation_guard import install_generation_tagging_init

from xdit_ir.emission.execution import first_line, is_watched
from xdit_ir.emission.shared import SharedCodes
from xdit_ir.ir import ops
from xdit_ir.ir.flops import counts
from xdit_ir.ir.graphs import takers

_NAMED = frozenset(
    ("BUILTIN_MATCH", "CLOSURE_MATCH", "FUNCTION_MATCH", "MODULE_MATCH", "CLASS_MATCH", "TYPE_MATCH", "ID_MATCH")
)


def prepare() -> None:
    """Change in `nn.Module` what the compiler changes when it is first used: a model looked at now stays as it is."""
    install_generation_tagging_init()


def can_fuse(graph: fx.Graph) -> bool:
    """Whether a compiler could make one kernel of several operators. Of products, and operators on single elements that
    only products take, it makes the kernels that there are already, behind more work for the host."""
    return any(_may_be_fused(node) for node in graph.nodes if node.op in ("call_function", "call_module"))


def _may_be_fused(node: fx.Node) -> bool:
    if node.op == "call_module":
        return True
    if ops.is_view(node.target) or counts(node.target):
        return False
    single = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not single or not all(user.op == "output" or counts(user.target) for user in takers(node, _is_view))


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and ops.is_view(node.target)


def not_of_globals(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's guards are looked at in a call: those of what a body is given, and of modes. Most of the
    others are of names, of operators and of functions of ours, which mean the same in every call."""
    return [not guard.is_global or guard.guard_type not in _NAMED for guard in guards]


def compile_body(
    module: nn.Module,
    codes: SharedCodes | None = None,
    *,
    fixed: bool = False,
    failed: Callable[[str], None] | None = None,
    native: Callable[[str], None] | None = None,
) -> None:
    """Compile in place; one graph, and the order of operators as it is written. Kernels that may be chosen by how long
    they take are those only that all sum in the same order, so that ranks which run the same call get the same bits.

    Args:
        codes: those of other bodies, which may be used; None: for static shapes.
        fixed: some intermediate tensors lie in memory that others write to, so none may be used for something else.
        failed: told why it cannot be compiled, at the first call, and it stays as it is; None: that is an error.
        native: kernels are launched by code in C++, which takes half of the host's time of a call and half a minute
            more to compile; told why, where that cannot be built, and Python launches them. None: Python does.
    """
    options: dict[str, Any] = {
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
        "deterministic": True,
        "guard_filter_fn": not_of_globals,
    }
    if fixed:
        options |= {"allow_buffer_reuse": False, "inplace_buffers": False}
    plain = module.forward

    def made(options: Mapping[str, Any]) -> Callable[..., Any]:
        shared = codes.of(module, options) if codes is not None and isinstance(module, fx.GraphModule) else None
        return shared or torch.compile(plain, fullgraph=True, dynamic=False, options=dict(options))

    compiled = made(options | ({} if native is None else {"cpp_wrapper": True}))

    def forward(*tensors: torch.Tensor) -> Any:
        nonlocal compiled, native
        if is_watched():
            return plain(*tensors)
        try:
            return compiled(*tensors)
        except TorchDynamoException as error:  # of compilation, so nothing was run
            if native is not None:
                native(f"kernels are launched by Python: {first_line(error)}")
                native, compiled = None, made(options)
                return forward(*tensors)
            if failed is None:
                raise
            module.forward = plain
            failed(f"a block is not compiled: {first_line(error)}")
            return plain(*tensors)

    module.forward = forward

"""`trace`: from a module and an example to a `Program`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.blocks import Blocks, candidates, prune
from xdit_ir.capture.inputs import bind_example, call_arguments, flatten_output, path_name
from xdit_ir.capture.skeleton import Skeleton
from xdit_ir.capture.tracer import Tracer, Unshareable
from xdit_ir.capture.values import small, spec_of
from xdit_ir.errors import TraceError
from xdit_ir.program import (
    Block,
    Guard,
    InputLeaf,
    Literal,
    Program,
    Signature,
    TensorSpec,
    Where,
    call_block,
    qualified,
)


def trace(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]) -> Program:
    """Capture a module for one input signature; nothing is allocated and the module stays as it was."""
    named = bind_example(model, example)
    try:
        return _trace(model, named, candidates(model))
    except Unshareable:
        return _trace(model, named, set())


def trace_device(model: nn.Module, leaves: list[Any]) -> torch.device:
    """The device on which a model runs."""
    for tensor in (*model.parameters(), *model.buffers(), *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))):
        return tensor.device
    return torch.device("cpu")


def _trace(model: nn.Module, named: dict[str, Any], chosen: set[int]) -> Program:
    paths, in_spec = pytree.tree_flatten_with_path(named)
    tracer = Tracer(trace_device(model, [leaf for _, leaf in paths]))
    leaves, guards = [], []
    args: list[Any] = []
    for path, leaf in paths:
        name = path_name(path)
        if isinstance(leaf, torch.Tensor):
            known = leaf.detach().cpu().clone() if _readable(leaf) else None
            value = tracer.input("in_" + "".join(c if c.isalnum() else "_" for c in name), leaf, known, frozenset({name}))
            args.append(value.fake)
            leaves.append(InputLeaf(name, spec_of(leaf)))
        else:
            args.append(leaf)
            leaves.append(InputLeaf(name, None))
            guards.append(Guard(name, leaf))
    with torch.inference_mode():
        skeleton = Skeleton(model, tracer.state)
        blocks = Blocks(tracer, skeleton.originals, chosen)
        _instrument(skeleton, tracer, blocks)
        call_args, call_kwargs = call_arguments(model, pytree.tree_unflatten(args, in_spec))
        with tracer:
            output = skeleton.model(*call_args, **call_kwargs)
        out_leaves, out_spec = flatten_output(output)
        outputs, places = [], []
        for leaf in out_leaves:
            if isinstance(leaf, torch.Tensor):
                places.append(len(outputs))
                outputs.append(leaf)
            else:
                places.append(Literal(leaf))
        nodes = tuple(tracer.node(item) for item in outputs)
        tracer.frame.emit("output", "output", (nodes,), {}, tuple(spec_of(item) for item in outputs), Where())
    prune(tracer.frame)
    for path, leaf in paths:
        name = path_name(path)
        if name in tracer.read_inputs and isinstance(leaf, torch.Tensor):
            guards.append(Guard(name, leaf.detach().cpu().clone(), tracer.read_inputs[name]))
    signature = Signature(in_spec, tuple(leaves), out_spec, tuple(places), tuple(guards))
    return _program(model, tracer, blocks, signature)


def _readable(leaf: torch.Tensor) -> bool:
    integral = not leaf.dtype.is_floating_point and not leaf.dtype.is_complex
    return integral and leaf.device.type != "meta" and small(leaf)


def _instrument(skeleton: Skeleton, tracer: Tracer, blocks: Blocks) -> None:
    """Wrap every copied module's forward so that paths are known and blocks are intercepted."""
    for copy_id, original in skeleton.originals.items():
        copy = skeleton._memo[id(original)]
        if "_forward_unimplemented" in getattr(type(copy).forward, "__name__", ""):
            continue
        copy.__dict__["forward"] = _wrapped(copy, skeleton.paths[copy_id], copy.forward, tracer, blocks)


def _wrapped(module: nn.Module, path: str, forward: Any, tracer: Tracer, blocks: Blocks) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        prefix = tracer.frame.prefix
        inner = path[len(prefix) + 1 :] if prefix and path.startswith(prefix + ".") else path
        wants = blocks.wants(module)
        if wants:
            return blocks.call(module, path, forward, args, kwargs)
        tracer.path.append("" if path == prefix else inner)
        try:
            return forward(*args, **kwargs)
        finally:
            tracer.path.pop()

    return wrapped


def _program(model: nn.Module, tracer: Tracer, blocks: Blocks, signature: Signature) -> Program:
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    made: dict[str, Block] = {}
    for body in blocks.bodies:
        number = counts.get(body.kind, 0)
        counts[body.kind] = number + 1
        names[body.name] = body.kind if number == 0 else f"{body.kind}_{number}"
        made[names[body.name]] = Block(names[body.name], body.frame.graph)
    graph = tracer.frame.graph
    for node in graph.nodes:
        if node.target is call_block:
            node.args = (names[node.args[0]], *node.args[1:])
    program = Program(type(model).__name__, graph, made, signature, {}, tracer.device)
    state: dict[str, TensorSpec] = {}
    used: set[str] = set()
    _collect(graph, "", state, used)
    for node in program.calls:
        _collect(made[str(node.args[0])].graph, str(node.args[1]), state, used)
    constants = {name: tensor for name, tensor in tracer.constants.items() if name in used}
    return program.replace(state=state, constants=constants)


def _collect(graph: Any, prefix: str, state: dict[str, TensorSpec], used: set[str]) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            name = qualified(prefix, str(node.target))
            if name.startswith("_constant."):
                used.add(name.removeprefix("_constant."))
            else:
                state[name] = node.meta["spec"]


__all__ = ["TraceError", "trace"]

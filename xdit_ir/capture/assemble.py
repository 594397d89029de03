"""A program and its signature, put together from what an attempt has recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.failures import Opaque
from xdit_ir.capture.finish import (
    inline_small,
    lift_weights,
    merge_equal,
    name_blocks,
    prune,
    rename_device,
    used_state,
)
from xdit_ir.capture.inputs import layout_of
from xdit_ir.capture.known import says_what_is_there
from xdit_ir.capture.mode_guards import asked_guards
from xdit_ir.capture.objects import snapshot
from xdit_ir.capture.outputs import attributes_of, flatten_output, literal
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.rolled_loops import roll
from xdit_ir.capture.values import Frame, ordinary, spec_of
from xdit_ir.errors import TraceError
from xdit_ir.ir.effects import Effect, Literal
from xdit_ir.ir.guards import STATE, STRIDES, Guard
from xdit_ir.ir.program import CONSTANT, WHERE, InputLeaf, Program, Signature, Where, qualified


def signature_of(
    recorder: Recorder,
    leaves: Sequence[tuple[str, Any]],
    in_spec: pytree.TreeSpec,
    output: Any,
    originals: Mapping[int, Any],
    effects_of: Callable[[Callable[[torch.Tensor], int]], tuple[Effect, ...]],
) -> Signature:
    """How calls become inputs, and the tensors of the output and of effects, by their places, become a result; writes
    the graph's last node."""
    out_leaves, out_spec = flatten_output(output)
    tensors: list[torch.Tensor] = []

    if recorder.selections is not None and recorder.selections.of(out_leaves):
        raise recorder.opaque(
            f"{recorder.selections.place}: a boolean index selects rows that forward returns, whose number depends on "
            "what cannot be known"
        )

    def place(tensor: torch.Tensor) -> int:
        if names := attributes_of(tensor):
            raise TraceError(
                f"forward returns a tensor with attributes of its own ({', '.join(names)}), which would be lost"
            )
        tensors.append(tensor)
        return len(tensors) - 1

    places: list[int | Literal] = [
        place(x) if isinstance(x, torch.Tensor) else literal(x, originals) for x in out_leaves
    ]
    effects = effects_of(place)
    nodes = tuple(recorder.node(tensor) for tensor in tensors)
    recorder.emit("output", "output", (nodes,), {}, tuple(spec_of(tensor) for tensor in tensors), Where())
    inputs = [InputLeaf(path, spec_of(leaf) if isinstance(leaf, torch.Tensor) else None) for path, leaf in leaves]
    guards = tuple(guard for path, leaf in leaves if (guard := _guard(recorder, path, leaf)) is not None)
    guards += tuple(_buffer_guard(recorder, name, reason) for name, reason in recorder.read_buffers.items())
    if recorder.read_layouts:
        laid = ((path, layout_of(leaf)) for path, leaf in leaves if isinstance(leaf, torch.Tensor))
        guards += tuple(Guard(f"{STRIDES}{path}", layout, recorder.read_layouts) for path, layout in laid)
    guards += asked_guards(recorder.asked)
    predicates = tuple(recorder.predicates)
    return Signature(in_spec, tuple(inputs), out_spec, tuple(places), guards, predicates, effects)


def _guard(recorder: Recorder, path: str, leaf: Any) -> Guard | None:
    if hasattr(type(leaf), "__next__"):
        raise TraceError(f"input {path!r} is a {type(leaf).__name__}, which can be read only once; give a list")
    if not isinstance(leaf, torch.Tensor):
        return Guard(path, snapshot(leaf), "not a tensor")
    if path not in recorder.read_inputs:
        return None
    return Guard(path, ordinary(leaf.detach().cpu()), recorder.read_inputs[path])


def _buffer_guard(recorder: Recorder, name: str, reason: str) -> Guard:
    return Guard(f"{STATE}{name}", ordinary(recorder.buffers[name]), reason)


def program_of(name: str, device: torch.device, recorder: Recorder, blocks: Blocks, signature: Signature) -> Program:
    """The program of what an attempt recorded."""
    graph = recorder.frame.graph
    prune(recorder.frame)
    for frame in (recorder.frame, *(body.frame for body in blocks.bodies)):
        roll(frame.graph, recorder)
        _check_constants(frame, recorder)
    bodies = {body.name: body.frame.graph for body in blocks.bodies}
    bodies = merge_equal(graph, bodies, recorder.constants)
    bodies = inline_small(graph, bodies)
    made = name_blocks(graph, bodies, {body.name: body.kind for body in blocks.bodies})
    state, used = used_state(graph, made)
    made = lift_weights(graph, made, state)
    constants = {key: _placed(recorder, key) for key in recorder.constants if key in used}
    for part in (graph, *(block.graph for block in made.values())):
        rename_device(part, recorder.device, device)
    read = {*recorder.read_inputs, *(f"{STATE}{name}" for name in recorder.read_buffers)}
    seen = recorder.inputs | {f"{STATE}{name}": x for name, x in recorder.buffers.items()}
    whole = {path: x for path, x in seen.items() if says_what_is_there(x)}
    contents = {path: ordinary(x.detach().cpu().clone()) for path, x in whole.items() if path not in read}
    return Program(name, graph, made, signature, constants, device, state, contents)


def _check_constants(frame: Frame, recorder: Recorder) -> None:
    """What still reads a tensor of `torch.vmap` or the like ran under it, and was not captured."""
    for node in frame.graph.nodes:
        constant = recorder.constants.get(str(node.target).removeprefix(f"{CONSTANT}."))
        if node.op == "get_attr" and constant is not None and is_functorch_wrapped_tensor(constant):
            where = node.meta[WHERE]
            path = qualified(frame.prefix, where.module).rstrip(".")
            raise Opaque(f"{where.source}: runs under a transform of torch.func (vmap or the like)", path)


def _placed(recorder: Recorder, name: str) -> torch.Tensor:
    """A constant on the device where the model's code wanted it."""
    tensor = recorder.constants[name]
    tensor = ordinary(tensor) if tensor.is_inference() else tensor
    return tensor.to(recorder.place(name))

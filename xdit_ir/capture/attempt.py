"""One attempt to capture a forward: a copy of the model runs on fake tensors, and every operator is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree

from xdit_ir.capture.asked import asked_guards, noted
from xdit_ir.capture.blocks import Blocks
from xdit_ir.capture.caches import clean_caches
from xdit_ir.capture.derivatives import recorded_derivatives
from xdit_ir.capture.dressed import dressed, dressing
from xdit_ir.capture.effects import ArgumentState
from xdit_ir.capture.failures import Opaque, RaisedByForward, ShapeDepends, Unshareable
from xdit_ir.capture.fingerprint import fingerprint
from xdit_ir.capture.finish import (
    inline_small,
    lift_weights,
    merge_equal,
    name_blocks,
    prune,
    rename_device,
    used_state,
)
from xdit_ir.capture.flex import uncompiled
from xdit_ir.capture.generators import given_generator
from xdit_ir.capture.identity import Identities
from xdit_ir.capture.inputs import call_arguments, flatten_named, layout_of, sharing
from xdit_ir.capture.instrument import Calls, instrument
from xdit_ir.capture.known import PythonReads, check_lent, readable, says_what_is_there
from xdit_ir.capture.ladder import Rung
from xdit_ir.capture.leaves import Leaves
from xdit_ir.capture.libraries import replacements
from xdit_ir.capture.marks import Marks
from xdit_ir.capture.objects import snapshot
from xdit_ir.capture.outputs import attributes_of, flatten_output, literal
from xdit_ir.capture.overwrites import Overwrite, beside, overwrites
from xdit_ir.capture.plain import uncast
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.references import Functions, replaced
from xdit_ir.capture.repeats import Repeats
from xdit_ir.capture.rolled import roll
from xdit_ir.capture.selected import Selections
from xdit_ir.capture.skeleton import Skeleton, watch
from xdit_ir.capture.source import failing_line, is_raised_outside
from xdit_ir.capture.state import StateWatch, Writes, writes_of
from xdit_ir.capture.tracer import Tracer
from xdit_ir.capture.values import Frame, TracedValue, ordinary, spec_of
from xdit_ir.errors import TraceError, XditError
from xdit_ir.ir.garbage import collector_paused
from xdit_ir.ir.program import (
    CONSTANT,
    STATE,
    STRIDES,
    WHERE,
    Effect,
    Guard,
    InputLeaf,
    Literal,
    Program,
    Signature,
    Where,
    qualified,
)

Flat = list[tuple[str, Any]]
Captured = tuple[Program, Writes, Sequence[Overwrite]]
"""A program, what forward left in Python objects, and what of that the program's effects do."""


@dataclass(frozen=True)
class Attempt:
    """A capture of forward for arguments that are `named`, or given by their places; the `rung` has the model, its
    blocks and its leaves. `keep`: forward is told of the caller's mode. `overwrite`: what it leaves in the model
    without having read it becomes effects. `marked`: as for `trace`."""

    rung: Rung
    named: dict[str, Any]
    by_name: bool
    keep: bool
    overwrite: bool
    marked: Mapping[str, int]

    def run(self, selections: Selections | None) -> Captured:
        """What is captured; raises one of `FAILURES` where it cannot be done on this rung."""
        model = self.rung.model
        functions = replacements(model)
        with collector_paused(), clean_caches(model), replaced(functions, model.modules()):
            return copy_context().run(self._recorded, functions, selections)  # a context variable cannot be unset

    def _recorded(self, functions: Functions, selections: Selections | None) -> Captured:
        model, rung = self.rung.model, self.rung
        leaves, in_spec = flatten_named(self.named)
        device = _device(model, leaves)
        recorder = Recorder(device)
        recorder.selections = selections
        values = {path: _input(recorder, path, x) for path, x in leaves if isinstance(x, torch.Tensor)}
        args = {path: values[path].fake if path in values else given_generator(leaf) for path, leaf in leaves}
        if self.keep:  # one tensor for two arguments is one in forward too; who calls compares that
            first: dict[int, str] = {}
            args |= {path: args[first.setdefault(id(x), path)] for path, x in leaves if path in values}
        with (
            noted(recorder.asked, model, as_called=self.keep),
            _watched(model, Skeleton(model, recorder.state, functions, partial(dressed, recorder)), args, in_spec) as (
                skeleton,
                given,
                watch,
            ),
        ):
            recorder.state_of, recorder.outside = skeleton.state_of, watch.outside
            chosen = {(path, "forward") for path in rung.blocks} | rung.repeated
            blocks = Blocks(recorder, chosen, _watch(skeleton, rung.blocks, recorder))
            called_whole = Leaves(recorder, rung.leaves, dict(model.named_modules()))
            marks = Marks(recorder, self.marked)
            blocks.chosen_below = lambda path: (called_whole.below(path), marks.below(path))
            repeats = Repeats(recorder, blocks, rung.repeated, rung.never)
            calls = Calls(recorder, blocks, called_whole, repeats, marks)
            instrument(skeleton, calls)
            call = call_arguments(inspect.signature(model.forward), given.named, self.by_name)
            with repeats.blamed():
                output = _run(skeleton.model, recorder, *call)
            check_lent(recorder)
            found = list(watch.changes())
            made = overwrites(found, skeleton.originals, recorder, model) if self.overwrite else []

            def effects(place: Callable[[torch.Tensor], int]) -> tuple[Effect, ...]:
                return (*given.effects(values, place), *(one.effect(place) for one in made))

            signature = _signature(recorder, leaves, in_spec, output, skeleton.originals, effects)
            if any(effect.write for effect in signature.effects) and (pair := sharing(leaves)):
                raise TraceError(f"{' and '.join(pair)} share memory, and forward writes to what it is given")
            originals = skeleton.originals
            writes = [beside(write, originals.get(id(write.part.item), write.part.item), made) for write in found]
            left_there = writes_of(writes, skeleton, recorder)
        program = _program(type(model).__name__, device, recorder, blocks, signature)
        skeleton.let_go()
        return program, left_there, made


@contextmanager
def _watched(
    model: nn.Module, skeleton: Skeleton, args: Mapping[str, Any], spec: pytree.TreeSpec
) -> Iterator[tuple[Skeleton, ArgumentState, StateWatch]]:
    """A copy to be traced, and its arguments; what its forward does to objects that are no copies is put back."""
    given, identities = ArgumentState(args, spec, skeleton.copy_of), Identities(model, skeleton)
    given.check_referring(identities)
    watch = StateWatch([("", skeleton.model), *given.callables])
    try:
        watch.exchange(identities.exchanged)
        yield skeleton, given, watch
        watch.check_draws()
    finally:
        watch.restore(skeleton.originals)


def _device(model: nn.Module, leaves: Flat) -> torch.device:
    """The device on which a model runs."""
    inputs = (leaf for _, leaf in leaves if isinstance(leaf, torch.Tensor))
    for tensors in (model.parameters(), model.buffers(), inputs):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _input(recorder: Recorder, path: str, leaf: torch.Tensor) -> TracedValue:
    if names := attributes_of(leaf):
        raise TraceError(f"input {path!r} has attributes of its own ({', '.join(names)}), which would be lost")
    if leaf.layout is not torch.strided or leaf.is_nested or leaf.is_quantized:
        kind = "nested" if leaf.is_nested else "quantized" if leaf.is_quantized else str(leaf.layout)
        raise TraceError(
            f"input {path!r} is a {kind} tensor; expected a dense one, such as to_dense() or padding gives"
        )
    recorder.inputs[path] = leaf
    name = "".join(char if char.isalnum() else "_" for char in path).strip("_")
    known = leaf.detach().cpu().clone() if readable(leaf) else None
    return recorder.input(name, leaf, recorder.device, known, path)


def _watch(skeleton: Skeleton, chosen: dict[str, nn.Module], recorder: Recorder) -> dict[str, set[tuple[str, str]]]:
    """Watch the plain attributes in which blocks of equal structure differ, such as the index of a layer."""
    prints = {path: fingerprint(skeleton.modules[path], recorder.held) for path in chosen}
    groups: list[list[str]] = []
    for path, print_ in prints.items():
        group = next((group for group in groups if prints[group[0]].structure == print_.structure), None)
        if group is None:
            groups.append([path])
        else:
            group.append(path)
    watched: dict[str, set[tuple[str, str]]] = {}
    for paths in groups:
        differing = set().union(*(prints[path].differs_from(prints[paths[0]]) for path in paths))
        for path in paths if differing else ():
            watched[path] = differing
            for owner in {owner for owner, _ in differing}:
                names = {name for other, name in differing if other == owner}
                _watch_module(skeleton.modules.get(f"{path}.{owner}".rstrip(".")), owner, names, recorder)
    return watched


def _watch_module(module: nn.Module | None, owner: str, names: set[str], recorder: Recorder) -> None:
    if module is not None:
        watch(module, names, lambda name: recorder.frame.attributes.add((owner, name)))


def _run(model: nn.Module, recorder: Recorder, args: list[Any], kwargs: dict[str, Any]) -> Any:
    recorder.entry = _run.__code__
    try:
        with uncompiled(), recorded_derivatives(), dressing(recorder), Tracer(recorder), PythonReads(recorder):
            output = model(*args, **kwargs)
            uncast(recorder.casts)
            return output
    except (XditError, Unshareable, ShapeDepends):
        raise
    except Exception as error:
        text = f"{failing_line(error)}: {type(error).__name__}: {error}"
        if is_raised_outside(error):
            raise RaisedByForward(text, error) from error
        raise TraceError(text) from error


def _signature(
    recorder: Recorder,
    leaves: Flat,
    in_spec: pytree.TreeSpec,
    output: Any,
    originals: Mapping[int, Any],
    effects_of: Callable[[Callable[[torch.Tensor], int]], tuple[Effect, ...]],
) -> Signature:
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


def _program(name: str, device: torch.device, recorder: Recorder, blocks: Blocks, signature: Signature) -> Program:
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

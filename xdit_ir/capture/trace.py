"""`trace`: from a module and an example to a `Program`."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from xdit_ir.capture.asked import asked_guards, noted
from xdit_ir.capture.blocks import Blocks, prune
from xdit_ir.capture.caches import clean_caches
from xdit_ir.capture.derivatives import recorded_derivatives
from xdit_ir.capture.effects import ArgumentState
from xdit_ir.capture.equality import compute_same
from xdit_ir.capture.failures import Opaque, RaisedByForward, ShapeDepends, Unshareable
from xdit_ir.capture.fingerprint import TRACED, fingerprint
from xdit_ir.capture.finish import inline_small, lift_weights, merge_equal, name_blocks, rename_device, used_state
from xdit_ir.capture.flex import uncompiled
from xdit_ir.capture.inputs import bind_example, call_arguments, flatten_named, layout_of, sharing
from xdit_ir.capture.known import PythonReads, check_lent, readable
from xdit_ir.capture.ladder import FAILURES, Rung
from xdit_ir.capture.leaves import Leaves, Wanted
from xdit_ir.capture.libraries import replacements
from xdit_ir.capture.objects import snapshot
from xdit_ir.capture.outputs import attributes_of, flatten_output, literal
from xdit_ir.capture.overwrites import Overwrite, beside, overwrites, trials
from xdit_ir.capture.plain import applied, odd_weight, uncast
from xdit_ir.capture.reach import GLOBAL_HOOKS, foreign_hooks, watchers_away
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.references import Functions, replaced
from xdit_ir.capture.selected import Selections
from xdit_ir.capture.skeleton import Skeleton, watch
from xdit_ir.capture.source import failing_line, is_raised_outside
from xdit_ir.capture.state import StateWatch, Write, Writes, left, refusal, writes_of
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

# A trace puts other functions in the place of PyTorch's, for the process.
_TURN = threading.RLock()
Example = Mapping[str, Any] | tuple[Any, ...]
Flat = list[tuple[str, Any]]


def trace(
    model: nn.Module,
    example: Example,
    leaf: Sequence[Wanted] = (),
    *,
    keep: bool = False,
) -> Program:
    """Capture a module's forward for one input signature as a `Program`.

    `example` holds forward's arguments by name, or its positional arguments. Model and example may be on any
    device, including meta. Nothing is computed but what Python must know, and the model is left as it was.
    Submodules that cannot be captured, and those named in `leaf`, become opaque leaves.

    Tables that forward fills once are left in the model if `keep`. Then the program is that of the calls to come, in
    the mode (gradients, inference) of the caller; otherwise forward is told that there is none.

    Raises:
        TraceError: forward cannot be captured, or keeps a state between calls: what it leaves in Python objects is
            written again at every call, changes what it does, or depends on its inputs. What it makes of weights before
            it reads it is no state.
    """
    if (odd := odd_weight(model)) is not None:
        raise TraceError(odd)
    if any(foreign_hooks(name) for name in GLOBAL_HOOKS):
        raise TraceError(
            "hooks of all modules (register_module_forward_hook) would see copies of the model's modules; "
            "register them on the modules that they are for"
        )
    with _TURN, _disable_current_modes(), watchers_away():  # of counters and profilers around the call
        return _traced(model, example, leaf, keep=keep)


def _traced(model: nn.Module, example: Example, leaf: Sequence[Wanted], *, keep: bool) -> Program:
    program, writes = _captured(model, example, leaf, keep)
    if not writes:
        return program
    with left(writes) as kept:
        again, more = _captured(model, example, leaf, keep)
        if more:
            raise refusal(more)
        if not compute_same(program, again, model):
            raise refusal(writes, ", after which it computes something else")
        if keep:
            kept()
    return again if keep else program


def _captured(model: nn.Module, example: Example, leaf: Sequence[Wanted], keep: bool) -> tuple[Program, list[Write]]:
    """A program, and what forward leaves in Python objects outside of its arguments."""
    program, writes, made = _tried(model, example, leaf, keep)
    if made and not _is_unread(model, example, leaf, keep, program, made):
        program, writes, _ = _tried(model, example, leaf, keep, overwrite=False)
    if writes.refused is None:
        return program, writes.kept
    if not writes.without:
        raise writes.refused
    with left(writes.without):
        try:
            again, *_ = _tried(model, example, leaf, keep)
        except XditError:
            raise writes.refused from None  # it is read before it is written
    if not compute_same(program, again, model):
        raise writes.refused
    return program, writes.kept


def _is_unread(
    model: nn.Module,
    example: Example,
    leaf: Sequence[Wanted],
    keep: bool,
    program: Program,
    made: Sequence[Overwrite],
) -> bool:
    """Whether the program is the same if what forward overwrites is not there, or left by another call."""
    for writes in trials(made):
        with left(writes):
            try:
                again, *_ = _tried(model, example, leaf, keep)
            except XditError:
                return False
        if not compute_same(program, again, model):
            return False
    return True


def _tried(
    model: nn.Module, example: Example, leaf: Sequence[Wanted], keep: bool, *, overwrite: bool = True
) -> tuple[Program, Writes, Sequence[Overwrite]]:
    named, by_name = bind_example(model, example), isinstance(example, Mapping)
    rung = Rung.top(model, leaf)
    while True:
        selections = Selections() if rung.selects else None
        attempt = partial(_attempt, rung, named, by_name, keep, overwrite=overwrite)
        try:
            found = attempt(selections)
        except FAILURES as failure:
            rung = rung.below(failure)
            continue
        if selections is None or all(_same_if(case, found[0], model, attempt) for case in selections.cases):
            return found
        rung = replace(rung, selects=False)


def _same_if(empty: frozenset[int], program: Program, model: nn.Module, attempt: Callable[..., Any]) -> bool:
    """Whether a program also does what forward does where these masks select nothing."""
    try:
        other, *_ = attempt(Selections(empty))
    except (*FAILURES, XditError):
        return False
    return compute_same(program, other, model, empty)


def _attempt(
    rung: Rung, named: dict[str, Any], by_name: bool, keep: bool, selections: Selections | None, *, overwrite: bool
) -> tuple[Program, Writes, Sequence[Overwrite]]:
    functions = replacements()
    with collector_paused(), clean_caches(rung.model), replaced(functions, rung.model.modules()):
        return _recorded(rung, named, by_name, functions, keep, selections, overwrite=overwrite)


def _recorded(
    rung: Rung,
    named: dict[str, Any],
    by_name: bool,
    functions: Functions,
    keep: bool,
    selections: Selections | None,
    *,
    overwrite: bool,
) -> tuple[Program, Writes, Sequence[Overwrite]]:
    model = rung.model
    leaves, in_spec = flatten_named(named)
    device = _device(model, leaves)
    recorder = Recorder(device)
    recorder.selections = selections
    values = {path: _input(recorder, path, x) for path, x in leaves if isinstance(x, torch.Tensor)}
    args = {path: values[path].fake if path in values else leaf for path, leaf in leaves}
    if keep:  # one tensor for two arguments is one in forward too; who calls compares that
        first: dict[int, str] = {}
        args |= {path: args[first.setdefault(id(x), path)] for path, x in leaves if path in values}
    with (
        noted(recorder.asked, model, as_called=keep),
        _watched(Skeleton(model, recorder.state, functions)) as (skeleton, watch),
    ):
        recorder.state_of, recorder.outside = skeleton.state_of, watch.outside
        blocks = Blocks(recorder, set(rung.blocks), _watch(skeleton, rung.blocks, recorder))
        called_whole = Leaves(recorder, rung.leaves, dict(model.named_modules()))
        blocks.leaves_below = called_whole.below
        _instrument(skeleton, recorder, blocks, called_whole)
        given = ArgumentState(args, in_spec, skeleton.copy_of)
        call = call_arguments(inspect.signature(model.forward), given.named, by_name)
        output = _run(skeleton.model, recorder, *call)
        check_lent(recorder)
        found = list(watch.changes())
        made = overwrites(found, skeleton.originals, recorder, model) if overwrite else []

        def effects(place: Callable[[torch.Tensor], int]) -> tuple[Effect, ...]:
            return (*given.effects(values, place), *(one.effect(place) for one in made))

        signature = _signature(recorder, leaves, in_spec, output, skeleton.originals, effects)
        if any(effect.write for effect in signature.effects) and (pair := sharing(leaves)):
            raise TraceError(f"{' and '.join(pair)} share memory, and forward writes to what it is given")
        originals = skeleton.originals
        writes = [beside(write, originals.get(id(write.part.item), write.part.item), made) for write in found]
        left_there = writes_of(writes, skeleton, recorder)
    return _program(type(model).__name__, device, recorder, blocks, signature), left_there, made


@contextmanager
def _watched(skeleton: Skeleton) -> Iterator[tuple[Skeleton, StateWatch]]:
    """A copy to be traced; what its forward does to objects that are no copies is put back."""
    watch = StateWatch([("", skeleton.model)])
    try:
        yield skeleton, watch
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


def _instrument(skeleton: Skeleton, recorder: Recorder, blocks: Blocks, leaves: Leaves) -> None:
    """Wrap every copied module's forward, so that paths are known and blocks are intercepted."""
    for path, module in skeleton.modules.items():
        module.__dict__["_apply"] = guard = applied(path, module, recorder.casts)
        setattr(guard, TRACED, type(module)._apply)
        if isinstance(module, nn.RNNBase):
            module.__dict__["_weights_have_changed"] = unchanged = _never(module)
            setattr(unchanged, TRACED, type(module)._weights_have_changed)
        forward = module.forward
        if getattr(forward, "__name__", "") != "_forward_unimplemented":
            names = skeleton.aliases[id(module)]
            module.__dict__["forward"] = _wrap(module, path, names, forward, recorder, blocks, leaves)


def _never(module: nn.RNNBase) -> Callable[[], bool]:
    """Whether a copy's weights have changed, of which it keeps the original's."""
    return lambda: False


def _wrap(
    module: nn.Module,
    path: str,
    names: list[str],
    forward: Any,
    recorder: Recorder,
    blocks: Blocks,
    leaves: Leaves,
) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        selected = recorder.selections is not None and recorder.selections.of((args, kwargs))
        if leaves.wants(path):
            if selected:
                raise recorder.opaque(f"{path} is called whole, with rows that a mask selects")
            return leaves.call(path, module, args, kwargs)
        if blocks.wants(path) and not selected:
            return blocks.call(module, path, forward, args, kwargs)
        inside = recorder.relative(names)
        recorder.path.append(path if inside is None else inside)
        try:
            return forward(*args, **kwargs)
        finally:
            recorder.path.pop()

    setattr(wrapped, TRACED, forward)
    return wrapped


def _run(model: nn.Module, recorder: Recorder, args: list[Any], kwargs: dict[str, Any]) -> Any:
    recorder.entry = _run.__code__
    try:
        with uncompiled(), recorded_derivatives(), Tracer(recorder), PythonReads(recorder):
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
    return Program(name, graph, made, signature, constants, device, state)


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
    return tensor.to(recorder.placed.get(name, tensor.device))

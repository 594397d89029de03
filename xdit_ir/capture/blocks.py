"""Repeated layers: which modules become blocks, when two calls are equal, and how a call becomes one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from xdit_ir.capture.calls import SubmoduleCall, describe_call
from xdit_ir.capture.failures import Restart, Spot, Unshareable
from xdit_ir.capture.finish import prune
from xdit_ir.capture.known import note_read
from xdit_ir.capture.list_effects import holders, left_behind
from xdit_ir.capture.objects import ClassMark, restore_objects
from xdit_ir.capture.operators import aten
from xdit_ir.capture.outputs import Record, flatten_output, literal, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.values import NO_ROOTS, Frame, FromArgument, Roots, TracedValue, spec_of
from xdit_ir.capture.writes import write
from xdit_ir.errors import TraceError
from xdit_ir.ir.effects import Literal
from xdit_ir.ir.program import Where, call_block
from xdit_ir.reflection.fakes import device_of
from xdit_ir.reflection.fingerprint import Fingerprint, Fingerprints, describe


@dataclass(frozen=True)
class Argument:
    """An output leaf that is one of the arguments, unchanged."""

    index: int


Item = int | Argument | Literal


@dataclass(frozen=True, eq=False)
class CapturedBody:
    """A traced body: when it fits a call, and what its results are to the caller.

    `known` are the contents of the arguments at the first call, `compare` those that must be the same at
    another one, `used` the arguments that it needs, `written` those that it leaves other contents in, which are
    its last results. `outputs` holds for every output leaf the index of a
    result, an `Argument` or a `Literal`; `left` the same for entries of lists among the arguments that it replaces, by
    place; `shared` are results that alias something.
    """

    name: str
    kind: str
    method: str
    frame: Frame
    print: Fingerprint
    call: SubmoduleCall
    known: list[torch.Tensor | None]
    compare: set[int]
    used: list[int]
    results: list[TracedValue]
    written: list[int]
    shared: set[int]
    outputs: list[Item]
    out_spec: pytree.TreeSpec
    left: dict[int, Item]


class Blocks:
    """The blocks of one trace, in order of their first call: `chosen` are the methods, forward mostly, that are called.

    `watched` are, by path of a block, the attributes in which modules of equal structure differ, as `prints` say.
    """

    def __init__(self, recorder: Recorder, chosen: set[Spot]) -> None:
        self.recorder, self.chosen = recorder, chosen
        self.watched: dict[str, set[tuple[str, str]]] = {}
        self.bodies: list[CapturedBody] = []
        self.prints = Fingerprints(recorder.held)
        self.chosen_below: Callable[[str], Any] = lambda path: None  # what else is done with the modules of one

    def wants(self, spot: Spot) -> bool:
        """Whether a call should become a block call; under `torch.func` its operators are recorded."""
        return self.recorder.frame.parent is None and spot in self.chosen and peek_interpreter_stack() is None

    def call(self, module: nn.Module, spot: Spot, forward: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a block: trace its body if it is new, then emit one node."""
        with self.recorder.recording(False):
            try:
                call, print_ = (
                    describe_call(self.recorder, forward, args, kwargs),
                    self.prints.of(module),
                )
                body = self._find(spot, print_, call)
                if body is None:
                    body = self._trace(module, spot, forward, print_, call)
                    self.bodies.append(body)
                left = holders((args, kwargs), body.left, module) if body.left else {}
                output, entries = self._emit(body, spot, call)
                for place, (held, index) in left.items():
                    held[index] = entries[place]
                return output
            except Unshareable as error:
                raise Restart(spot) from error

    def _find(self, spot: Spot, print_: Fingerprint, call: SubmoduleCall) -> CapturedBody | None:
        path, method = spot
        ignored = self.watched.get(path, set())
        for body in self.bodies:
            if body.method != method or body.call.key != call.key or body.print.structure != print_.structure:
                continue
            if body.frame.strides and body.call.strides != call.strides:
                continue
            if self.chosen_below(path) != self.chosen_below(body.frame.prefix):
                continue
            if not print_.differs_from(body.print) <= ignored - body.frame.attributes:
                continue
            compared = body.compare | body.frame.reads
            if all(_same(body.known[index], call.values[index].known) for index in compared):
                return body
        return None

    def _trace(
        self, module: nn.Module, spot: Spot, forward: Any, print_: Fingerprint, call: SubmoduleCall
    ) -> CapturedBody:
        recorder, (path, method) = self.recorder, spot
        outer, frame = recorder.frame, Frame(path, recorder.frame, call.values)
        recorder.frame = frame
        recorder.path.append("")
        try:
            inner = [
                recorder.input(name, value.fake, device_of(value.fake), value.known, FromArgument(frame, index))
                for index, (name, value) in enumerate(zip(call.names, call.values, strict=True))
            ]
            fakes = {id(tensor): value.fake for tensor, value in zip(call.tensors, inner, strict=True)}
            leaves = [fakes.get(id(leaf), leaf) for leaf in call.leaves]
            args, kwargs = restore_objects(pytree.tree_unflatten(leaves, call.spec))
            before = _described(leaves)
            with recorder.recording(True):
                output = forward(*args, **kwargs)
            left = left_behind(leaves, call.spec, (args, kwargs))
            if _described(leaves) != before or self.prints.of(module) != print_:
                raise Unshareable("writes to its attributes, or to objects that it is given")
            kind = type(module).__name__
            return self._finish((kind, method), print_, call, inner, output, left)
        finally:
            recorder.path.pop()
            recorder.frame = outer

    def _finish(
        self,
        kind: Spot,
        print_: Fingerprint,
        call: SubmoduleCall,
        inner: list[TracedValue],
        output: Any,
        left: dict[int, Any],
    ) -> CapturedBody:
        recorder, frame = self.recorder, self.recorder.frame
        leaves, out_spec = flatten_output(output)
        arguments = {id(value): index for index, value in enumerate(inner)}
        results: dict[int, TracedValue] = {}
        outputs: list[Item] = []
        for leaf in (*leaves, *left.values()):
            if not isinstance(leaf, torch.Tensor):
                outputs.append(_plain(leaf))
                continue
            value = recorder.value(leaf)
            if id(value) in arguments:
                outputs.append(Argument(arguments[id(value)]))
            else:
                results.setdefault(id(value), value)
                outputs.append(list(results).index(id(value)))
        shared = _aliased(list(results.values()), inner)
        written = {index: value for index, value in enumerate(inner) if value.storage.version}
        if any(call.values[index].known is not None for index in written):
            raise Unshareable("writes to a tensor whose contents are known")
        made = [*results.values(), *written.values()]
        nodes = tuple(recorder.node(value.fake) for value in made)
        specs = tuple(spec_of(value.fake) for value in made)
        recorder.emit("output", "output", (nodes,), {}, specs, Where())
        outputs, replaced = outputs[: len(leaves)], dict(zip(left, outputs[len(leaves) :], strict=True))
        known = [value.known for value in call.values]
        carried = any(value.known is not None for value in made)
        compare = {index for index, item in enumerate(known) if carried and item is not None}
        name, used = f"body{len(self.bodies)}", prune(frame)
        return CapturedBody(
            *(name, *kind, frame, print_, call, known, compare, used, made, list(written), shared, outputs, out_spec),
            left=replaced,
        )

    def _emit(self, body: CapturedBody, spot: Spot, call: SubmoduleCall) -> tuple[Any, dict[int, Any]]:
        """Emit the call; its output, and the new entries of lists by place."""
        recorder, (path, method) = self.recorder, spot
        for index in body.frame.reads:
            note_read(recorder, call.values[index].roots, "inside a block")
        arguments = [recorder.node(call.tensors[index]) for index in body.used]
        where = Where(path, recorder.where().source)
        specs = tuple(spec_of(value.fake) for value in body.results)
        args, name = (body.name, path, arguments), path.replace(".", "_") if method == "forward" else method
        node = recorder.emit("call_function", call_block, args, {}, specs, where, name)
        made: list[torch.Tensor] = []
        for index, value in enumerate(body.results):
            fake, part = recorder.blank(value.fake), recorder.item(node, index, specs[index])
            known = None if value.known is None else value.known.clone()
            bound = recorder.bind(fake, part, known, _outside(value.roots, call.values))
            bound.storage.shared = index in body.shared
            made.append(fake)
        for index, fake in zip(body.written, made[len(made) - len(body.written) :], strict=True):
            _write_back(recorder, call, index, fake)
        if body.shared:
            for value in call.values:
                value.storage.shared = True
        leaves = [_leaf(item, made, call.tensors) for item in body.outputs]
        left = {place: _leaf(item, made, call.tensors) for place, item in body.left.items()}
        return unflatten_output(leaves, body.out_spec), left


def _write_back(recorder: Recorder, call: SubmoduleCall, index: int, contents: torch.Tensor) -> None:
    """Give the caller's tensor the contents that a block left in it."""
    value = call.values[index]
    if sum(other.storage is value.storage for other in call.values) > 1:
        raise Unshareable("writes to one of two arguments that share memory")
    write(recorder, aten.copy_.default, (call.tensors[index], contents), {})


def _leaf(item: Item, made: list[torch.Tensor], arguments: list[torch.Tensor]) -> Any:
    if isinstance(item, Literal):
        return item.value
    return arguments[item.index] if isinstance(item, Argument) else made[item]


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))


def _outside(roots: Roots, values: list[TracedValue]) -> Roots:
    """Roots of a body's value as the caller sees them."""
    outside = (values[root.index].roots if isinstance(root, FromArgument) else {root} for root in roots)
    return NO_ROOTS.union(*outside)


def _plain(leaf: Any) -> Literal:
    if isinstance(leaf, Record) and not is_dataclass(leaf.kind):
        raise Unshareable("returns an object with tensors inside, which may be one that it was given")
    try:
        return literal(leaf)
    except TraceError as error:
        raise Unshareable("returns an object with tensors inside") from error


def _described(leaves: list[Any]) -> list[Any]:
    return [describe(leaf) for leaf in leaves if not isinstance(leaf, (torch.Tensor, ClassMark))]


def _aliased(results: list[TracedValue], inner: list[TracedValue]) -> set[int]:
    """Results that share storage with one another, with an argument or with state."""
    owners = [id(value.storage) for value in (*results, *inner)]
    return {
        index
        for index, value in enumerate(results)
        if owners.count(id(value.storage)) > 1 or value.storage.owner or value.frame is None
    }

"""Repeated layers: which modules become blocks, when two calls are equal, and how a call becomes one node."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.fingerprint import fingerprint
from xdit_ir.capture.inputs import flatten_output
from xdit_ir.capture.source import source_line
from xdit_ir.capture.tracer import Tracer, Unshareable
from xdit_ir.capture.values import Frame, Value, spec_of
from xdit_ir.program import Literal, Where, call_block

_LITERALS = (str, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)


def candidates(model: nn.Module) -> set[int]:
    """Ids of the modules that may become blocks: members of a list that has another member of the same class."""
    chosen: set[int] = set()
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None and child._modules]
        listed = isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for child in children:
            twins = sum(type(other) is type(child) for other in children)
            if twins >= (2 if listed else 3):
                chosen.add(id(child))
    return chosen


@dataclass(eq=False)
class Body:
    """A traced body. `outputs`: per output leaf the index of a result, `Argument` or `Literal`."""

    name: str
    kind: str
    frame: Frame
    structure: Any
    call: CallShape
    known: dict[int, torch.Tensor]
    used: list[int]
    results: list[torch.Tensor]
    outputs: list[Any]
    out_spec: pytree.TreeSpec
    aliases_arguments: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Argument:
    """An output leaf that is one of the arguments, unchanged."""

    index: int


@dataclass(eq=False)
class CallShape:
    """Arguments of a block call: distinct tensors, and how they and literals make up the arguments."""

    tensors: list[torch.Tensor]
    key: tuple[Any, ...]
    spec: pytree.TreeSpec
    leaves: list[Any]


def call_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallShape:
    """Flatten a call's arguments; raises `Unshareable` for arguments that have no value of their own."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors: list[torch.Tensor] = []
    places: dict[int, int] = {}
    key: list[Any] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in places:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
            key.append((places[id(leaf)], tuple(leaf.shape), leaf.stride(), leaf.dtype, str(leaf.device)))
        elif isinstance(leaf, _LITERALS):
            key.append((type(leaf), leaf))
        else:
            raise Unshareable(f"an argument of type {type(leaf).__name__}")
    return CallShape(tensors, tuple(key), spec, leaves)


class Blocks:
    """The blocks of one trace, in order of their first call."""

    def __init__(self, tracer: Tracer, originals: dict[int, nn.Module], chosen: set[int]) -> None:
        self.tracer, self.originals, self.chosen = tracer, originals, chosen
        self.bodies: list[Body] = []

    def wants(self, module: nn.Module) -> bool:
        """Whether a call of this (copied) module should become a block call."""
        return self.tracer.frame.parent is None and id(self.originals.get(id(module))) in self.chosen

    def call(self, module: nn.Module, path: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a block: trace its body if it is new, then emit one node; inline it if it cannot be shared."""
        try:
            shape = call_shape(args, kwargs)
            structure = fingerprint(self.originals[id(module)])
            values = [self.tracer.value(tensor) for tensor in shape.tensors]
            body = self._find(structure, shape, values)
            if body is None:
                body = self._trace(module, path, forward, structure, shape, values)
                self.bodies.append(body)
        except Unshareable:
            return forward(*args, **kwargs)
        return self._emit(body, path, shape, values)

    def _find(self, structure: Any, shape: CallShape, values: list[Value]) -> Body | None:
        for body in self.bodies:
            if body.call.key == shape.key and body.call.spec == shape.spec and body.structure == structure:
                if all(_same(body.known.get(index), values[index].known) for index in body.frame.reads):
                    return body
        return None

    def _trace(
        self, module: nn.Module, path: str, forward: Any, structure: Any, shape: CallShape, values: list[Value]
    ) -> Body:
        tracer = self.tracer
        outer, tracer.frame = tracer.frame, Frame(path, tracer.frame, outer=values)
        try:
            inner = [
                tracer.input(f"arg{index}", value.fake, value.known, frozenset({f"<arg {index}>"}))
                for index, value in enumerate(values)
            ]
            fakes = {id(value.fake): made.fake for value, made in zip(values, inner, strict=True)}
            leaves = [fakes[id(tracer.value(leaf).fake)] if isinstance(leaf, torch.Tensor) else leaf for leaf in shape.leaves]
            call_args, call_kwargs = pytree.tree_unflatten(leaves, shape.spec)
            before = fingerprint(module)
            output = forward(*call_args, **call_kwargs)
            if fingerprint(module) != before or any(value.storage.version for value in inner):
                raise Unshareable("writes to attributes or arguments")
            return self._finish(type(self.originals[id(module)]).__name__, structure, shape, values, inner, output)
        finally:
            tracer.frame = outer

    def _finish(
        self, kind: str, structure: Any, shape: CallShape, values: list[Value], inner: list[Value], output: Any
    ) -> Body:
        tracer, frame = self.tracer, self.tracer.frame
        leaves, out_spec = flatten_output(output)
        places = {id(value): index for index, value in enumerate(inner)}
        storages = {id(value.storage): index for index, value in enumerate(inner)}
        outputs: list[Any] = []
        results: list[torch.Tensor] = []
        nodes: list[fx.Node] = []
        aliased: set[int] = set()
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                outputs.append(Literal(leaf))
                continue
            value = tracer.value(leaf)
            if id(value) in places:
                outputs.append(Argument(places[id(value)]))
                continue
            if value.known is not None:
                raise Unshareable("an output whose value is known")
            if id(value.storage) in storages:
                aliased.add(storages[id(value.storage)])
            outputs.append(len(results))
            results.append(leaf)
            nodes.append(tracer.node(leaf))
        frame.emit("output", "output", (tuple(nodes),), {}, tuple(spec_of(item) for item in results), Where())
        used = prune(frame)
        known = {index: value.known for index, value in enumerate(values) if value.known is not None}
        name = f"body{len(self.bodies)}"
        return Body(name, kind, frame, structure, shape, known, used, results, outputs, out_spec, aliased)

    def _emit(self, body: Body, path: str, shape: CallShape, values: list[Value]) -> Any:
        tracer = self.tracer
        for index in body.frame.reads:
            tracer._note_read(values[index], source_line())
        arguments = [tracer.node(shape.tensors[index]) for index in body.used]
        where = Where(path, source_line())
        specs = tuple(spec_of(item) for item in body.results)
        node = tracer.frame.emit("call_function", call_block, (body.name, path, arguments), {}, specs, where)
        roots = tracer._roots(shape.tensors) | frozenset({"the model's parameters"})
        made: list[torch.Tensor] = []
        for index, item in enumerate(body.results):
            fake = tracer.blank(item)
            part = tracer.frame.emit("call_function", operator.getitem, (node, index), {}, specs[index], where)
            tracer.bind(fake, part, None, roots).storage.shared_by_block = True
            made.append(fake)
        for index in body.aliases_arguments:
            values[index].storage.shared_by_block = True
        leaves = [_output(item, made, shape.tensors) for item in body.outputs]
        from xdit_ir.capture.inputs import _close

        return _close(pytree.tree_unflatten(leaves, body.out_spec))


def _output(item: Any, made: list[torch.Tensor], arguments: list[torch.Tensor]) -> Any:
    if isinstance(item, Literal):
        return item.value
    return arguments[item.index] if isinstance(item, Argument) else made[item]


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


def prune(frame: Frame) -> list[int]:
    """Drop dead nodes of a finished graph, and of a body also dead arguments; indices of the arguments kept."""
    for node in reversed(list(frame.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            frame.graph.erase_node(node)
    kept: list[int] = []
    for index, value in enumerate(frame.arguments):
        placeholder = next(iter([node for node in frame.graph.nodes if node.name == f"arg{index}"]), None)
        if frame.parent is None or placeholder is None or placeholder.users:
            kept.append(index)
        else:
            frame.graph.erase_node(placeholder)
    return kept

"""Repeated layers: which modules become blocks, when two calls are equal, and how a call becomes one node."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_ir.capture.fingerprint import Fingerprint, describe, fingerprint
from xdit_ir.capture.inputs import path_name
from xdit_ir.capture.known import note_read
from xdit_ir.capture.outputs import flatten_output, literal, unflatten_output
from xdit_ir.capture.recorder import Recorder
from xdit_ir.capture.values import NO_ROOTS, Frame, FromArgument, Origin, Roots, Unshareable, Value, spec_of
from xdit_ir.program import Literal, Where, call_block


class Restart(BaseException):
    """The trace must begin anew, with some modules not taken as blocks. Never seen by the model's own handlers."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True)
class Argument:
    """An output leaf that is one of the arguments, unchanged."""

    index: int


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a block call: the distinct tensors, and how they and literals make up the arguments."""

    tensors: list[torch.Tensor]
    names: list[str]
    key: tuple[Any, ...]
    leaves: list[Any]
    spec: pytree.TreeSpec


@dataclass(frozen=True, eq=False)
class Body:
    """A traced body: when it fits a call, and what its results are to the caller.

    `used` are the arguments that it needs, `compare` those whose known contents must be the same; `outputs` holds per
    output leaf the index of a result, an `Argument` or a `Literal`; `shared` are results that alias something.
    """

    name: str
    kind: str
    frame: Frame
    print: Fingerprint
    key: tuple[Any, ...]
    known: list[torch.Tensor | None]
    compare: set[int]
    used: list[int]
    results: list[Value]
    shared: set[int]
    outputs: list[int | Argument | Literal]
    out_spec: pytree.TreeSpec


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may become blocks: with children of their own, and siblings of their class."""
    chosen: dict[str, nn.Module] = {}
    for path, parent in model.named_modules():
        children = {
            name: child for name, child in parent._modules.items() if child is not None and child._modules
        }
        enough = 2 if isinstance(parent, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else 3
        kinds = [type(child) for child in children.values()]
        for name, child in children.items():
            if kinds.count(type(child)) >= enough:
                chosen[f"{path}.{name}" if path else name] = child
    return chosen


def describe_call(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Flatten a call's arguments; raises `Unshareable` for arguments with tensors or modules hidden inside."""
    try:
        given: Any = inspect.signature(forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = {}
    first = dict(zip(map(id, args), given, strict=False))
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    places: dict[int, int] = {}
    key: list[Any] = [str(spec)]
    for path, leaf in paths:
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in places:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
                rest = path[1:] if path[0].idx == 1 else path[2:]
                head = "" if path[0].idx == 1 else first.get(id(args[path[1].idx]), "arg")
                names.append((head + path_name(rest)).replace(".", "_").replace("[", "_").replace("]", ""))
            key.append((places[id(leaf)], tuple(leaf.shape), leaf.stride(), leaf.dtype, str(leaf.device)))
        elif isinstance(leaf, nn.Module) or any(
            isinstance(x, torch.Tensor) for x in pytree.tree_leaves(_inside(leaf))
        ):
            raise Unshareable(f"an argument of type {type(leaf).__name__}")
        else:
            key.append(describe(leaf))
    return Call(tensors, names, tuple(key), [leaf for _, leaf in paths], spec)


def _inside(leaf: Any) -> Any:
    return vars(leaf) if hasattr(leaf, "__dict__") and not callable(leaf) else None


class Blocks:
    """The blocks of one trace, in order of their first call. `watched` are attributes in which equal modules differ."""

    def __init__(
        self, recorder: Recorder, chosen: set[str], watched: dict[str, set[tuple[str, str]]]
    ) -> None:
        self.recorder, self.chosen, self.watched = recorder, chosen, watched
        self.bodies: list[Body] = []

    def wants(self, path: str) -> bool:
        """Whether a call of this module should become a block call."""
        return self.recorder.frame.parent is None and path in self.chosen

    def call(
        self, module: nn.Module, path: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a block: trace its body if it is new, then emit one node."""
        try:
            call, print_ = describe_call(forward, args, kwargs), fingerprint(module)
            values = [self.recorder.value(tensor) for tensor in call.tensors]
            body = self._find(path, print_, call, values)
            if body is None:
                body = self._trace(module, path, forward, print_, call, values)
                self.bodies.append(body)
        except Unshareable as error:
            raise Restart(path) from error
        return self._emit(body, path, call, values)

    def _find(self, path: str, print_: Fingerprint, call: Call, values: list[Value]) -> Body | None:
        ignored = self.watched.get(path, set())
        for body in self.bodies:
            if body.key != call.key or body.print.structure != print_.structure:
                continue
            skipped = ignored - body.frame.attributes
            differs = (
                name for name, item in print_.scalars.items() if body.print.scalars.get(name, body) != item
            )
            same = all(
                _same(body.known[index], values[index].known) for index in body.compare | body.frame.reads
            )
            if same and all(name in skipped for name in differs):
                return body
        return None

    def _trace(
        self, module: nn.Module, path: str, forward: Any, print_: Fingerprint, call: Call, values: list[Value]
    ) -> Body:
        recorder = self.recorder
        outer, recorder.frame = recorder.frame, Frame(path, recorder.frame, values)
        recorder.path.append("")
        try:
            inner = [
                recorder.input(
                    name, value.fake, value.fake.device, value.known, FromArgument(recorder.frame, index)
                )
                for index, (name, value) in enumerate(zip(call.names, values, strict=True))
            ]
            fakes = {id(tensor): value.fake for tensor, value in zip(call.tensors, inner, strict=True)}
            leaves = [fakes.get(id(leaf), leaf) for leaf in call.leaves]
            args, kwargs = pytree.tree_unflatten(leaves, call.spec)
            output = forward(*args, **kwargs)
            after = pytree.tree_leaves((args, kwargs))
            kept = len(after) == len(leaves) and all(
                new is old for new, old in zip(after, leaves, strict=True)
            )
            if not kept or any(value.storage.version for value in inner) or fingerprint(module) != print_:
                raise Unshareable("writes to its arguments or attributes")
            return self._finish(type(module).__name__, print_, call, values, inner, output)
        finally:
            recorder.path.pop()
            recorder.frame = outer

    def _finish(
        self, kind: str, print_: Fingerprint, call: Call, values: list[Value], inner: list[Value], output: Any
    ) -> Body:
        recorder, frame = self.recorder, self.recorder.frame
        leaves, out_spec = flatten_output(output)
        arguments = {id(value): index for index, value in enumerate(inner)}
        results: dict[int, Value] = {}
        outputs: list[int | Argument | Literal] = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                outputs.append(literal(leaf))
                continue
            value = recorder.value(leaf)
            if id(value) in arguments:
                outputs.append(Argument(arguments[id(value)]))
            else:
                results.setdefault(id(value), value)
                outputs.append(list(results).index(id(value)))
        made = list(results.values())
        nodes = tuple(recorder.node(value.fake) for value in made)
        recorder.emit("output", "output", (nodes,), {}, tuple(spec_of(value.fake) for value in made), Where())
        known = [value.known for value in values]
        compare = (
            {i for i, item in enumerate(known) if item is not None}
            if any(v.known is not None for v in made)
            else set()
        )
        shared = _aliased(made, inner)
        name = f"body{len(self.bodies)}"
        used = prune(frame)
        return Body(
            name, kind, frame, print_, call.key, known, compare, used, made, shared, outputs, out_spec
        )

    def _emit(self, body: Body, path: str, call: Call, values: list[Value]) -> Any:
        recorder = self.recorder
        for index in body.frame.reads:
            note_read(recorder, values[index].roots, "inside a block")
        arguments = [recorder.node(call.tensors[index]) for index in body.used]
        where = Where(path, recorder.where().source)
        specs = tuple(spec_of(value.fake) for value in body.results)
        name = path.replace(".", "_")
        node = recorder.emit(
            "call_function", call_block, (body.name, path, arguments), {}, specs, where, name
        )
        made: list[torch.Tensor] = []
        for index, value in enumerate(body.results):
            fake, part = recorder.blank(value.fake), recorder.item(node, index, specs[index])
            known = None if value.known is None else value.known.clone()
            bound = recorder.bind(fake, part, known, _outside(value.roots, values))
            bound.storage.shared = index in body.shared
            made.append(fake)
        if body.shared:
            for value in values:
                value.storage.shared = True
        return unflatten_output([_leaf(item, made, call.tensors) for item in body.outputs], body.out_spec)


def _leaf(item: int | Argument | Literal, made: list[torch.Tensor], arguments: list[torch.Tensor]) -> Any:
    if isinstance(item, Literal):
        return item.value
    return arguments[item.index] if isinstance(item, Argument) else made[item]


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))


def _outside(roots: Roots, values: list[Value]) -> Roots:
    return NO_ROOTS.union(
        *(values[root.index].roots if isinstance(root, FromArgument) else {root} for root in roots)
    ) | (NO_ROOTS if roots else frozenset[Origin]())


def _aliased(results: list[Value], inner: list[Value]) -> set[int]:
    """Results that share storage with one another, with an argument or with state."""
    owners = [id(value.storage) for value in (*results, *inner)]
    return {
        index
        for index, value in enumerate(results)
        if owners.count(id(value.storage)) > 1 or value.storage.owner or value.frame is None
    }


def prune(frame: Frame) -> list[int]:
    """Drop dead nodes of a finished graph, and of a body also dead arguments; indices of the arguments kept."""
    graph: fx.Graph = frame.graph
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    if frame.parent is None:
        return list(range(len(frame.placeholders)))
    kept = [index for index, node in enumerate(frame.placeholders) if node.users]
    for node in frame.placeholders:
        if not node.users:
            graph.erase_node(node)
    return kept

"""From one rank's program to Python: a graph module per block, whose weights are arguments, and one around them."""

from __future__ import annotations

import contextlib
import keyword
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.emission.bound import bind
from xdit_ir.emission.slots import slot_call, slot_spec
from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Slot
from xdit_ir.ir.collective_ops import Communicate, PeerExchange, Reshuffle, Together
from xdit_ir.ir.graphs import add_node, all_graphs, copy_node, operands, placeholders
from xdit_ir.ir.named_tensors import constants_on
from xdit_ir.ir.program import CONSTANT, SPEC, Program, TensorSpec, call_parts, called_block, is_block_call, qualified
from xdit_ir.kernels.attention import KernelAttention, KernelCall
from xdit_ir.transport.collectives import Exchange, can_be_at_once, lower
from xdit_ir.transport.direct import direct_halves
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.mailbox import Custody, Mailbox, PeerReceive, PeerSend, slot_sequence
from xdit_ir.transport.packing import PACKED
from xdit_ir.transport.uploads import AwaitUpload, StartUpload, upload_stream

_OTHER = re.compile(r"\W")


@dataclass(frozen=True, eq=False)
class EmittedBody:
    """A block as a module: `module(*values, *weights, *constants, *slots)`; slots are relative to a call's prefix.

    One that exchanges over symmetric memory takes the workspace and the letter of the call after these.

    `module` has no parameters and is the same for all layers, so compiling it once compiles all of them.
    """

    module: fx.GraphModule
    constants: tuple[str, ...]
    slots: tuple[str, ...] = ()
    uses_mailbox: bool = False


@dataclass(frozen=True, eq=False)
class Code:
    """The forward of a rank's `program`: `run(*inputs, *weights, *constants, *slots)`, of which these are the names,
    gives the outputs.

    With a `mailbox`, what that opens comes after these. `failures` says what could not be compiled or recorded.
    """

    program: Program
    run: fx.GraphModule
    bodies: Mapping[str, EmittedBody]
    weights: Sequence[str]
    constants: Sequence[str]
    slots: Mapping[str, TensorSpec | None]
    mailbox: Mailbox | None = None
    failures: list[str] = field(default_factory=list)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The outputs, for all that `run` takes."""
        outputs: Sequence[torch.Tensor] = self.run.forward(*tensors)
        self.finish()
        return outputs

    def constant_tensors(self, device: torch.device) -> list[torch.Tensor]:
        """The constants, as the model has them when it is on `device`."""
        return list(constants_on(self.program, self.constants, device).values())

    def enter(self) -> None:
        """Before a forward: see to it that what another program has sent is not overwritten."""
        if self.mailbox is not None:
            self.mailbox.enter()

    def finish(self) -> None:
        """Make the current stream wait for what a forward, or a part of it, has sent."""
        if self.mailbox is not None:
            self.mailbox.join()

    def note(self, failure: str) -> None:
        """Remember and say what does not run as fast as its mode means it to."""
        self.failures.append(failure)
        warnings.warn(f"slower than it could be: {failure}", stacklevel=2)

    @property
    def unchanging(self) -> frozenset[str]:
        """The placeholders whose contents are the same at every call: constants, and what the mailbox opens."""
        names = [node.name for node in placeholders(self.run.graph)]
        end = len(names) - (0 if self.mailbox is None else 1 + len(self.mailbox.letters))
        first = end - len(self.slots) - len(self.constants)
        return frozenset(names[first : first + len(self.constants)] + names[end:])


def generate(
    program: Program,
    communicator: Communicator,
    device: torch.device,
    *,
    direct: bool = False,
    at_once: bool = False,
    plain: bool = False,
) -> Code:
    """Code for one rank's program on `device`; the process groups that it needs exist already.

    `plain`: it is run as it is, neither compiled nor recorded; `direct`: and calls process groups by itself. `at_once`:
    blocks are compiled, and wait for exchanges where they start them, as far as they can.
    """
    bodies = {}
    mailbox = Mailbox.of(program, communicator)
    for name, block in program.blocks.items():
        writer = _CodeWriter(name, program.device, device, communicator, mailbox, direct)
        writer.at_once, writer.plain = at_once and _only_at_once(block.graph), plain
        writer.ordered = writer.at_once or (not plain and _of_two_kinds(block.graph))
        if writer.ordered:
            import xdit_ir.transport.exchange_op  # noqa: F401  # registers operators
        read = _state(block.graph)
        constants = writer.head(block.graph, list(read), read)
        slots = writer.buffers(list(_slot_specs(block.graph)))
        bodies[name] = EmittedBody(writer.write(block.graph, {}), constants, slots, bool(writer.shared))
    writer = _CodeWriter(program.name, program.device, device, communicator, mailbox, direct)
    writer.plain = plain
    (weights, state), held = state_names(program), slot_specs(program)
    writer.head(program.graph, weights + state, _program_state(program))
    writer.buffers(list(held))
    if mailbox is not None:
        writer.share(mailbox)
    return Code(program, writer.write(program.graph, bodies), bodies, weights, state, held, mailbox)


def communications(program: Program) -> Iterator[Communicate]:
    """The targets of all nodes of a rank's program in which it talks to others."""
    for _, graph, _ in all_graphs(program):
        for node in graph.nodes:
            if isinstance(node.target, Communicate):
                yield node.target


def _only_at_once(graph: fx.Graph) -> bool:
    """Whether ranks talk in this graph in one way only; PyTorch's compiler keeps the order of its own collectives."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, Communicate)]
    return all(can_be_at_once(target) for target in targets if len(target.group) > 1)


def _of_two_kinds(graph: fx.Graph) -> bool:
    """Whether some exchanges go over symmetric memory and others do not: PyTorch's compiler knows no order of both."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, Communicate)]
    peers = {isinstance(target, PeerExchange) for target in targets if len(target.group) > 1}
    return len(peers) > 1


def state_names(program: Program) -> tuple[list[str], list[str]]:
    """Qualified names of the weights, and names of the constants, that a program reads: each once."""
    seen = _program_state(program)
    constants = [name for name in seen if name.startswith(f"{CONSTANT}.")]
    return [name for name in seen if name not in set(constants)], constants


def _program_state(program: Program) -> dict[str, fx.Node]:
    found = _state(program.graph)
    for call in program.calls:
        found |= _state(program.blocks[called_block(call)].graph)
    return found


def _state(graph: fx.Graph) -> dict[str, fx.Node]:
    """The weights and constants that a graph reads, by name, each with a node which reads it."""
    return {str(node.target): node for node in graph.nodes if node.op == "get_attr"}


def slot_specs(program: Program) -> dict[str, TensorSpec | None]:
    """Qualified names of the buffers that a program uses, in the order of its arguments; None: it only reads it."""
    found = _slot_specs(program.graph)
    for call in program.calls:
        name, prefix, *_ = call_parts(call)
        inner = _slot_specs(program.blocks[name].graph)
        found |= {key: spec for slot, spec in inner.items() if found.get(key := qualified(prefix, slot)) is None}
    return found


def _slot_specs(graph: fx.Graph) -> dict[str, TensorSpec | None]:
    found: dict[str, TensorSpec | None] = {}
    for node in graph.nodes:
        if isinstance(node.target, Slot) and found.get(node.target.slot) is None:
            found[node.target.slot] = slot_spec(node)
    return found


class _CodeWriter:
    """Writes one graph anew: weights become placeholders, communications become calls of modules."""

    def __init__(
        self,
        name: str,
        traced: torch.device,
        device: torch.device,
        communicator: Communicator,
        mailbox: Mailbox | None,
        direct: bool,
    ) -> None:
        self.name, self.traced, self.device, self.communicator = name, traced, device, communicator
        self.mailbox, self.direct, self.at_once, self.plain = mailbox, direct, False, False
        self.ordered = False  # each exchange is told which one was before
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.state: dict[str, fx.Node] = {}
        self.modules: dict[str, nn.Module] = {}
        self.pending: dict[fx.Node, tuple[nn.Module, fx.Node]] = {}
        self.taken: set[str] = set()
        self.custody = Custody()
        self.shared: list[fx.Node] = []
        self.slots: dict[str, Iterator[int]] = {}
        self.letters: dict[tuple[str, int], fx.Node] = {}
        self.kept: dict[str, fx.Node] = {}
        self.uploads: torch.cuda.Stream | None = None

    def head(self, source: fx.Graph, names: Sequence[str], read: Mapping[str, fx.Node]) -> tuple[str, ...]:
        """Write the placeholders: the inputs, then the weights and constants called `names`."""
        for node in source.nodes:
            if node.op == "placeholder":
                self.env[node] = self.graph.node_copy(node)
                self.taken.add(str(node.target))
        for name in names:
            self.state[name] = self._argument(name)
            self.state[name].meta.update(read[name].meta)
        return tuple(self.state)

    def buffers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Write the placeholders of the buffers called `names`."""
        self.kept = {name: self._argument(name) for name in names}
        return tuple(names)

    def _argument(self, name: str) -> fx.Node:
        """A placeholder whose name, which becomes that of an argument in Python, no other has."""
        wanted = _identifier(name)
        wanted = wanted if wanted.isidentifier() and not keyword.iskeyword(wanted) else f"_{wanted}"
        name, count = wanted, 0
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return add_node(self.graph, "placeholder", name)

    def share(self, mailbox: Mailbox) -> None:
        """Write the placeholders of an outer graph for what the mailbox opens."""
        self.shared = [self._argument("workspace")]
        self.letters = {key: self._argument(f"letter_{key[0]}_{key[1]}") for key in mailbox.letters}
        self.slots = {block: iter(slot_sequence(calls)) for block, calls in mailbox.calls.items()}

    def write(self, source: fx.Graph, bodies: Mapping[str, EmittedBody]) -> fx.GraphModule:
        """Write the rest and make a module of it."""
        for node in source.nodes:
            if node.op == "get_attr":
                self.env[node] = self.state[str(node.target)]
            elif node.op != "placeholder":
                self._wait_for(list(self.pending) if node.op == "output" else node.all_input_nodes)
                self.env[node] = self._node(node, bodies)
        self.custody.close()
        return fx.GraphModule(self.modules, self.graph, _identifier(self.name))

    def _node(self, node: fx.Node, bodies: Mapping[str, EmittedBody]) -> fx.Node:
        if is_block_call(node):
            return self._block_call(node, bodies)
        if isinstance(node.target, Communicate):
            return self._communication(node, node.target)
        if node.target is ops.upload:
            self.uploads = self.uploads or upload_stream(self.device)
            given = tuple(self.env[value] for value in operands(node))
            return self._started(node, "upload", (StartUpload(self.uploads), AwaitUpload()), given, {})
        if isinstance(node.target, KernelAttention):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
            call = KernelCall(node.target)
            return self._call(f"attention_{len(self.modules)}", call, args, dict(kwargs), node.name)
        if isinstance(node.target, Slot):
            values = [self.env[value] for value in node.all_input_nodes]
            return slot_call(self.graph, node, self.kept[node.target.slot], values)
        new = copy_node(self.graph, node, self.env.__getitem__)
        if new.kwargs.get("device") == self.traced:
            new.update_kwarg("device", self.device)
        if self.plain:
            bind(new)
        return new

    def _communication(self, node: fx.Node, target: Communicate) -> fx.Node:
        """Started here; what waits for it is written just before the first operator that needs the result."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        if isinstance(target, PeerExchange):
            assert self.mailbox is not None
            return self._put(node, args, *self.mailbox.modules(self.name, node, target))
        halves = self._halves(node, target)
        if not self.ordered or len(target.group) < 2:
            return self._started(node, target.kind, halves, args, dict(kwargs))
        latest = self.custody.latest
        new = self._started(node, target.kind, halves, args, kwargs | ({"after": tuple(latest)} if latest else {}))
        self.custody.latest = [self.graph.call_function(operator.getitem, (new, 0)) if halves[1:] else new]
        return new

    def _halves(self, node: fx.Node, target: Communicate) -> Sequence[nn.Module]:
        if self.direct and (type(target) is Reshuffle or isinstance(target, Together)) and len(target.group) > 1:
            several = isinstance(target, Together)
            if (node.meta[SPEC][0] if several else node.meta[SPEC]).dtype in PACKED:
                exchanges = target.exchanges if isinstance(target, Together) else (target.exchange,)
                group = self.communicator.among(target.group)
                return direct_halves(exchanges, target.group.index(self.communicator.rank), group, one=not several)
        return lower(target, self.communicator, at_once=self.at_once)

    def _started(self, node: fx.Node, kind: str, halves: Sequence[nn.Module], args: Any, kwargs: Any) -> fx.Node:
        """A call of what does all of it, or of the first half; the second one is to be called with what that gives."""
        first, *rest = halves
        name = f"{node.name}_start" if rest else node.name
        new = self._call(f"{kind}_{len(self.modules)}", first, args, kwargs, name)
        if rest:
            self.pending[node] = rest[0], new
        return new

    def _put(self, node: fx.Node, args: Any, send: PeerSend, receive: PeerReceive) -> fx.Node:
        """As `_communication`, with the workspace and the letter of this call."""
        if not self.shared:
            written = [one for one in self.graph.nodes if one.op != "placeholder"]
            with self.graph.inserting_before(written[0]) if written else contextlib.nullcontext():
                self.shared = [self._argument("workspace"), self._argument("letter")]
        given = (*args, *self.shared, *self.custody.latest)
        new = self._call(f"put_{len(self.modules)}", send, given, {}, f"{node.name}_start")
        self.pending[node] = receive, new
        self.custody.start(new)
        return new

    def _wait_for(self, sources: Iterable[fx.Node]) -> None:
        """Write the waits for those of these values that are on their way. What this rank needs nothing of is awaited
        in the end: a compiler leaves out what nobody waits for, and others would wait for what it sends."""
        for source in sources:
            if source in self.pending:
                module, started = self.pending.pop(source)
                if isinstance(module, PeerReceive):
                    send = self.modules[str(started.target)]
                    assert isinstance(send, PeerSend)
                    args = (started, *self.shared, *self.custody.wait(started, send, module))
                else:
                    args = self._handed(started, module)
                self.env[source] = self._call(f"wait_{len(self.modules)}", module, args, {}, source.name)
                if isinstance(module, PeerReceive):
                    self.custody.waited(self.env[source])

    def _handed(self, started: fx.Node, second: nn.Module) -> tuple[fx.Node, ...]:
        """What a second half is given of that what the first one gave."""
        assert isinstance(second, Exchange)
        if second.handed is None:
            return (started,)
        return tuple(self.graph.call_function(operator.getitem, (started, place)) for place in range(second.handed))

    def _call(self, place: str, module: nn.Module, args: Any, kwargs: dict[str, Any], name: str) -> fx.Node:
        self.modules[place] = module
        return add_node(self.graph, "call_module", place, args, kwargs, name)

    def _block_call(self, node: fx.Node, bodies: Mapping[str, EmittedBody]) -> fx.Node:
        name, prefix, *_ = call_parts(node)
        body = bodies[name]
        place = f"block_{list(bodies).index(name)}_{_identifier(name)}"  # `Block.2` and `Block_2` are two
        self.modules[place] = body.module
        given = [self.env[value] for value in operands(node)]
        given += [self.state[constant] for constant in body.constants]
        given += [self.kept[qualified(prefix, slot)] for slot in body.slots]
        shared = (self.shared[0], self.letters[name, next(self.slots[name])]) if body.uses_mailbox else ()
        return add_node(self.graph, "call_module", place, (*given, *shared), name=node.name)


def _identifier(name: str) -> str:
    return _OTHER.sub("_", name)

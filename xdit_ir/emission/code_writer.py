"""One graph of a rank's program as code: weights become arguments, communications become calls of modules."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.emission.bound import bind
from xdit_ir.emission.slots import slot_call
from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Slot
from xdit_ir.ir.collective_ops import AllGather, Communicate, PeerExchange, Reshuffle, Together
from xdit_ir.ir.graphs import add_node, copy_node, operands
from xdit_ir.ir.program import SPEC, call_parts, is_block_call, qualified
from xdit_ir.kernels.attention import KernelAttention, KernelCall
from xdit_ir.transport.collectives import Exchange, lower
from xdit_ir.transport.direct import direct_halves
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.mailbox import Custody, Mailbox, PeerReceive, PeerSend, slot_sequence
from xdit_ir.transport.packing import PACKED
from xdit_ir.transport.pulls import pull_halves
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


@dataclass(frozen=True)
class How:
    """How a graph is written.

    `plain`: it is run as it is, neither compiled nor recorded; `direct`: and calls process groups by itself. `at_once`:
    exchanges are awaited where they start. `ordered`: each one is told which was before. `pulls`: parts of weights lie
    where other ranks can read them.
    """

    plain: bool = False
    direct: bool = False
    at_once: bool = False
    ordered: bool = False
    pulls: bool = False


USUAL = How()


class CodeWriter:
    """Writes one graph anew: weights become placeholders, communications become calls of modules."""

    def __init__(
        self,
        name: str,
        traced: torch.device,
        device: torch.device,
        communicator: Communicator,
        mailbox: Mailbox | None,
        how: How,
    ) -> None:
        self.name, self.traced, self.device, self.communicator = name, traced, device, communicator
        self.mailbox, self.how = mailbox, how
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

    def take_letter(self) -> None:
        """Write the placeholders of a body for the workspace and the letter of a call."""
        self.shared = [self._argument("workspace"), self._argument("letter")]

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
        if self.how.plain:
            bind(new)
        return new

    def _communication(self, node: fx.Node, target: Communicate) -> fx.Node:
        """Started here; what waits for it is written just before the first operator that needs the result."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        if isinstance(target, PeerExchange):
            assert self.mailbox is not None
            return self._put(node, args, *self.mailbox.modules(self.name, node, target))
        halves = self._halves(node, target)
        if not self.how.ordered or len(target.group) < 2:
            return self._started(node, target.kind, halves, args, dict(kwargs))
        new = self._started(node, target.kind, halves, args, {**kwargs, "after": tuple(self.custody.latest)})
        self.custody.latest = [self.graph.call_function(operator.getitem, (new, 0)) if halves[1:] else new]
        return new

    def _halves(self, node: fx.Node, target: Communicate) -> Sequence[nn.Module]:
        if self.how.direct and (type(target) is Reshuffle or isinstance(target, Together)) and len(target.group) > 1:
            several = isinstance(target, Together)
            if (node.meta[SPEC][0] if several else node.meta[SPEC]).dtype in PACKED:
                exchanges = target.exchanges if isinstance(target, Together) else (target.exchange,)
                group = self.communicator.among(target.group)
                return direct_halves(exchanges, target.group.index(self.communicator.rank), group, one=not several)
        if self.how.pulls and isinstance(target, AllGather) and len(target.group) > 1 and _stays(operands(node)[0]):
            return pull_halves(node, self.communicator)
        return lower(target, self.communicator, at_once=self.how.at_once)

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


def _stays(source: fx.Node) -> bool:
    """Whether a value is where it is for good."""
    return source.op == "get_attr"

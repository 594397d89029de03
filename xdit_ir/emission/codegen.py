"""From one rank's program to Python: a graph module per block, whose weights are arguments, and one around them."""

from __future__ import annotations

import inspect
import itertools
import keyword
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.emission.execution import Execution
from xdit_ir.emission.slots import slot_call, slot_spec
from xdit_ir.ir import ops
from xdit_ir.ir.buffer_ops import Slot
from xdit_ir.ir.collective_ops import Communicate, Ring
from xdit_ir.ir.graphs import all_graphs, operands
from xdit_ir.ir.program import CONSTANT, SPEC, Program, TensorSpec, call_parts, called_block, is_block_call, qualified
from xdit_ir.kernels.attention import Attention
from xdit_ir.kernels.backends import Backend, Problem, choose
from xdit_ir.kernels.fuse import fused, linear_gelu, write_slice, writes_in_place
from xdit_ir.transport.collectives import lower
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.mailbox import Custody, Mailbox, PeerReceive, PeerSend, slot_sequence


@dataclass(frozen=True, eq=False)
class EmittedBody:
    """A block as a module: `module(*values, *weights, *constants, *slots)`; slots are relative to a call's prefix.

    One that exchanges over symmetric memory takes the workspace and the slot of the call after these.

    `module` has no parameters and is the same for all layers, so compiling it once compiles all of them.
    """

    module: fx.GraphModule
    constants: tuple[str, ...]
    slots: tuple[str, ...] = ()
    uses_mailbox: bool = False


@dataclass(frozen=True, eq=False)
class Code:
    """A rank's forward: `run(*inputs, *weights, *constants, *slots)`, ordered as in `state_names` and `slot_specs`,
    gives the outputs.

    With a `mailbox`, what that opens comes after these.
    """

    run: fx.GraphModule
    bodies: Mapping[str, EmittedBody]
    mailbox: Mailbox | None = None


def generate(
    program: Program,
    communicator: Communicator,
    device: torch.device,
    execution: Execution | None = None,
    *,
    peer: bool = False,
) -> Code:
    """Code for one rank's program on `device`; the process groups that it needs exist already.

    `peer`: exchanges inside blocks go over symmetric memory where they can.
    """
    execution = execution or Execution()
    bodies = {}
    mailbox = Mailbox.of(program, communicator) if peer else None
    for name, block in program.blocks.items():
        writer = _CodeWriter(name, program.device, device, communicator, execution)
        constants = writer.head(block.graph, _state_names(block.graph))
        slots = writer.buffers(list(_slot_specs(block.graph)))
        writer.mailbox = mailbox
        bodies[name] = EmittedBody(writer.write(block.graph, {}), constants, slots, bool(writer.shared))
    writer = _CodeWriter(program.name, program.device, device, communicator, execution)
    writer.head(program.graph, list(itertools.chain(*state_names(program))))
    writer.buffers(list(slot_specs(program)))
    mailbox = mailbox if mailbox and mailbox.channels else None
    if mailbox is not None:
        writer.share(mailbox)
    return Code(writer.write(program.graph, bodies), bodies, mailbox)


def communications(program: Program) -> Iterator[Communicate]:
    """The targets of all nodes of a rank's program in which it talks to others."""
    for _, graph, _ in all_graphs(program):
        for node in graph.nodes:
            if isinstance(node.target, Communicate):
                yield node.target


def state_names(program: Program) -> tuple[list[str], list[str]]:
    """Qualified names of the weights, and names of the constants, that a program reads: each once."""
    seen = dict.fromkeys(_state_names(program.graph))
    for call in program.calls:
        seen |= dict.fromkeys(_state_names(program.blocks[called_block(call)].graph))
    constants = [name for name in seen if name.startswith(f"{CONSTANT}.")]
    return [name for name in seen if name not in set(constants)], constants


def _state_names(graph: fx.Graph) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))


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
        self, name: str, traced: torch.device, device: torch.device, communicator: Communicator, execution: Execution
    ) -> None:
        self.name, self.traced, self.device, self.communicator = name, traced, device, communicator
        self.execution = execution
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.state: dict[str, fx.Node] = {}
        self.modules: dict[str, nn.Module] = {}
        self.pending: dict[fx.Node, tuple[nn.Module, fx.Node]] = {}
        self.fusions: dict[fx.Node, fx.Node] = {}
        self.mailbox: Mailbox | None = None
        self.taken: set[str] = set()
        self.custody = Custody()
        self.shared: list[fx.Node] = []
        self.slots: dict[str, Iterator[int]] = {}
        self.kept: dict[str, fx.Node] = {}

    def head(self, source: fx.Graph, names: Sequence[str]) -> tuple[str, ...]:
        """Write the placeholders: the inputs, then the weights called `names`."""
        for node in source.nodes:
            if node.op == "placeholder":
                self.env[node] = self.graph.node_copy(node)
                self.taken.add(str(node.target))
        for name in names:
            self.state[name] = self._argument(name)
        return tuple(self.state)

    def buffers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Write the placeholders of the buffers called `names`."""
        self.kept = {name: self._argument(name) for name in names}
        return tuple(names)

    def _argument(self, name: str) -> fx.Node:
        """A placeholder whose name, which becomes that of an argument in Python, no other has."""
        wanted = _identifier(name)
        wanted = wanted if wanted.isidentifier() and not keyword.iskeyword(wanted) else f"_{wanted}"
        names = itertools.chain([wanted], (f"{wanted}_{count}" for count in itertools.count(1)))
        name = next(one for one in names if one not in self.taken)
        self.taken.add(name)
        return self.graph.placeholder(name)

    def share(self, mailbox: Mailbox) -> None:
        """Write the placeholders of an outer graph for what the mailbox opens."""
        self.shared = [self._argument(name) for name in ("workspace", "slot_0", "slot_1", "slot_2")]
        self.slots = {block: iter(slot_sequence(calls)) for block, calls in mailbox.calls.items()}

    def write(self, source: fx.Graph, bodies: Mapping[str, EmittedBody]) -> fx.GraphModule:
        """Write the rest and make a module of it."""
        self.fusions = dict(found for node in source.nodes if (found := self._fused(node)))
        for node in source.nodes:
            if node.op == "get_attr":
                self.env[node] = self.state[str(node.target)]
            elif node.op != "placeholder":
                self._wait_for(node)
                self.env[node] = self._node(node, bodies)
        self.custody.close()
        return fx.GraphModule(self.modules, self.graph, _identifier(self.name))

    def _fused(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        return fused(node) if self.device.type == "cuda" else None

    def _node(self, node: fx.Node, bodies: Mapping[str, EmittedBody]) -> fx.Node:
        if node in self.fusions:
            args = fx.map_arg(node.args, self.env.__getitem__)
            return self.graph.create_node("call_function", linear_gelu, args, name=node.name)
        if node in self.fusions.values():
            return self.env[node.all_input_nodes[0]]
        if is_block_call(node):
            return self._block_call(node, bodies)
        if isinstance(node.target, Communicate):
            return self._communication(node, node.target)
        backend = choose(self.execution.attention, self._problem(node)) if node.target is ops.attention else None
        if backend is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
            return self._call(f"attention_{len(self.modules)}", Attention(backend), args, dict(kwargs), node.name)
        if isinstance(node.target, Slot):
            values = [self.env[value] for value in node.all_input_nodes]
            return slot_call(self.graph, node, self.kept[node.target.slot], values)
        new = self.graph.node_copy(node, self.env.__getitem__)
        if writes_in_place(node):
            new.target = write_slice
        if new.kwargs.get("device") == self.traced:
            new.update_kwarg("device", self.device)
        return new

    def _problem(self, node: fx.Node) -> Problem:
        """The shapes of an attention."""
        given = inspect.signature(ops.attention).bind(*node.args, **node.kwargs).arguments
        q, k, v = (given[name].meta[SPEC] for name in ("q", "k", "v"))
        masked, causal = given.get("mask") is not None, bool(given.get("is_causal"))
        return Problem(q.shape, k.shape, v.shape, q.dtype, self.device, masked, causal, self.execution.cuda_graph)

    def _ring_kernels(self, node: fx.Node, keys: Sequence[int]) -> list[Backend | None]:
        """The kernels for the keys of each member of a ring, which come with as many heads as queries have."""
        problem = self._problem(node)
        parts = ((*problem.q[:-2], count) for count in keys)
        each = (replace(problem, k=(*part, problem.k[-1]), v=(*part, problem.v[-1])) for part in parts)
        return [choose(self.execution.attention, one, lse=True) for one in each]

    def _communication(self, node: fx.Node, target: Communicate) -> fx.Node:
        """Started here; what waits for it is written just before the first operator that needs the result."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
        over_peers = self.mailbox.lower(self.name, node) if self.mailbox is not None else None
        if over_peers is not None:
            return self._put(node, args, *over_peers)
        kernels = self._ring_kernels(node, target.keys) if isinstance(target, Ring) else ()
        first, *rest = lower(target, self.communicator, kernels)
        name = f"{node.name}_start" if rest else node.name
        new = self._call(f"{target.kind}_{len(self.modules)}", first, args, dict(kwargs), name)
        if rest:
            self.pending[node] = rest[0], new
        return new

    def _put(self, node: fx.Node, args: Any, send: PeerSend, receive: PeerReceive) -> fx.Node:
        """As `_communication`, with the workspace and the slot of this call."""
        if not self.shared:
            with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
                self.shared = [self._argument("workspace"), self._argument("slot")]
        new = self._call(f"put_{len(self.modules)}", send, (*args, *self.shared), {}, f"{node.name}_start")
        self.pending[node] = receive, new
        self.custody.start(new)
        return new

    def _wait_for(self, node: fx.Node) -> None:
        """Write the waits for those operands of a node that are on their way."""
        for source in node.all_input_nodes:
            if source in self.pending:
                module, started = self.pending.pop(source)
                args = tuple(self.graph.call_function(operator.getitem, (started, place)) for place in range(2))
                if isinstance(module, PeerReceive):
                    send = self.modules[str(started.target)]
                    assert isinstance(send, PeerSend)
                    args += (*self.shared, *self.custody.wait(started, args[0], send, module))
                self.env[source] = self._call(f"wait_{len(self.modules)}", module, args, {}, source.name)

    def _call(self, place: str, module: nn.Module, args: Any, kwargs: dict[str, Any], name: str) -> fx.Node:
        self.modules[place] = module
        return self.graph.create_node("call_module", place, args, kwargs, name=name)

    def _block_call(self, node: fx.Node, bodies: Mapping[str, EmittedBody]) -> fx.Node:
        name, prefix, *_ = call_parts(node)
        body = bodies[name]
        place = f"block_{_identifier(name)}"
        self.modules[place] = body.module
        given = [self.env[value] for value in operands(node)]
        given += [self.state[constant] for constant in body.constants]
        given += [self.kept[qualified(prefix, slot)] for slot in body.slots]
        shared = (self.shared[0], self.shared[1 + next(self.slots[name])]) if body.uses_mailbox else ()
        return self.graph.create_node("call_module", place, (*given, *shared), name=node.name)


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)

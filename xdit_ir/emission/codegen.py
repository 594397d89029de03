"""From one rank's program to Python: a graph module per block, whose weights are arguments, and one around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from xdit_ir.emission.code_writer import USUAL, CodeWriter, EmittedBody, How
from xdit_ir.emission.slots import slot_spec
from xdit_ir.ir.buffer_ops import Slot
from xdit_ir.ir.collective_ops import Communicate, PeerExchange
from xdit_ir.ir.graphs import all_graphs, placeholders
from xdit_ir.ir.named_tensors import constants_on
from xdit_ir.ir.program import CONSTANT, Program, TensorSpec, call_parts, called_block, qualified
from xdit_ir.transport.collectives import can_be_at_once
from xdit_ir.transport.distributed import Communicator
from xdit_ir.transport.mailbox import Mailbox


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
    how: How = USUAL,
) -> Code:
    """Code for one rank's program on `device`; the process groups that it needs exist already. Blocks exchange
    `at_once` as far as they can; which of them do so in order follows from what they exchange."""
    bodies = {}
    mailbox = Mailbox.of(program, communicator)

    def writer(name: str, how: How) -> CodeWriter:
        return CodeWriter(name, program.device, device, communicator, mailbox, how)

    for name, block in program.blocks.items():
        by_peers = _by_peers(block.graph)
        at_once = how.at_once and _only_at_once(block.graph)
        ordered = at_once or (not how.plain and len(by_peers) > 1)  # PyTorch's compiler knows no order of both kinds
        if ordered:
            import xdit_ir.transport.exchange_op  # noqa: F401  # registers operators
        inner, read = writer(name, replace(how, at_once=at_once, ordered=ordered)), _state(block.graph)
        constants = inner.head(block.graph, list(read), read)
        slots = inner.buffers(list(_slot_specs(block.graph)))
        if True in by_peers:
            inner.take_letter()
        bodies[name] = EmittedBody(inner.write(block.graph, {}), constants, slots, bool(inner.shared))
    outer = writer(program.name, replace(how, at_once=False))
    (weights, state), held = state_names(program), slot_specs(program)
    outer.head(program.graph, weights + state, _program_state(program))
    outer.buffers(list(held))
    if mailbox is not None:
        outer.share(mailbox)
    return Code(program, outer.write(program.graph, bodies), bodies, weights, state, held, mailbox)


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


def _by_peers(graph: fx.Graph) -> set[bool]:
    """Whether exchanges go over symmetric memory: all, none (of those that there are), or some."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, Communicate)]
    return {isinstance(target, PeerExchange) for target in targets if len(target.group) > 1}


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

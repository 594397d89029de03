"""Do two programs of one model compute the same? Where one computes what the other holds as a constant, they do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from xdit_ir.capture.selected import NUMBER
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import all_graphs, placeholders
from xdit_ir.ir.leaf import Leaf
from xdit_ir.ir.program import CONSTANT, Program, call_parts, is_block_call

_CPU = torch.device("cpu")
_SMALL = 1 << 16


@dataclass(frozen=True, eq=False)
class _Constant:
    """A value that depends on neither inputs nor weights: made when it is asked for."""

    make: Callable[[], Any]


def compute_same(
    left: Program, right: Program, model: nn.Module, empty: frozenset[int] = frozenset(), *, weights: bool = False
) -> bool:
    """Whether two programs do the same to the same inputs, operator by operator, but for what can be known before, and
    where the masks `empty` select nothing. With `weights`, small weights are known too: tables are made of them."""
    known = dict(model.named_buffers(remove_duplicate=False))
    if weights:
        small = model.named_parameters(remove_duplicate=False)
        known |= {name: item.detach() for name, item in small if item.numel() <= _SMALL}
    known = {name: item for name, item in known.items() if not item.is_meta}
    found = [_Meaning(one, known, empty) for one in (left, right)]
    return bool(found[0].key() == found[1].key() and found[0].draws() == found[1].draws())


class _Meaning:
    """A program as nested tuples in short: digests."""

    def __init__(self, program: Program, buffers: Mapping[str, torch.Tensor], empty: frozenset[int]) -> None:
        self._program, self._buffers, self._empty = program, buffers, empty

    def draws(self) -> int:
        """How many operators draw random numbers."""
        return sum(
            count * sum(is_random(node.target) for node in graph.nodes) for _, graph, count in all_graphs(self._program)
        )

    def key(self) -> Any:
        """Equal for programs that compute the same."""
        inputs = [_digest(("input", index)) for index, _ in enumerate(placeholders(self._program.graph))]
        signature = self._program.signature
        places = tuple(item if isinstance(item, int) else repr(item) for item in signature.out_leaves)
        effects = tuple((repr(one.path), repr(one.leaves), one.write) for one in signature.effects)
        return (self._graph(self._program.graph, inputs), places, effects, str(signature.out_spec))

    def _graph(self, graph: fx.Graph, inputs: Sequence[Any]) -> list[str]:
        """What a graph returns, as digests."""
        feed, env = iter(inputs), dict[fx.Node, Any]()
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(feed)
            elif node.op == "get_attr":
                env[node] = self._state(str(node.target))
            elif node.op == "output":
                return [_key(env[item]) for item in node.args[0]]
            elif node.meta.get(NUMBER) in self._empty:
                env[node] = env[node.args[2]]
            elif is_block_call(node):
                parts = call_parts(node)
                given = [env[item] for item in (*parts.values, *parts.weights.values())]
                env[node] = self._graph(self._program.blocks[parts.block].graph, given)
            else:
                env[node] = self._operator(node, env)
        raise AssertionError("a graph ends with an output")

    def _state(self, name: str) -> Any:
        if name.startswith(f"{CONSTANT}."):
            held = self._program.constants[name.partition(".")[2]]
            return _Constant(lambda: held.cpu())
        if name in self._buffers:
            return _Constant(lambda: self._buffers[name].cpu())
        return _digest(("weight", name))

    def _operator(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        operands = [env[item] for item in node.all_input_nodes]
        if getattr(target, "__name__", "") == "getitem" and isinstance(operands[0], list):
            return operands[0][node.args[1]]  # type: ignore[index]
        if target is torch.ops.aten.clone.default:  # nothing is written in place
            return env[node.args[0]]  # type: ignore[index]
        known = all(isinstance(item, _Constant) for item in operands)
        if known and not isinstance(target, Leaf) and not is_random(target):
            return _Constant(_once(lambda: self._run(node, env)))
        args = fx.map_arg((node.args, node.kwargs), lambda item: _Key(_key(env[item])))
        name = (id(target.module), target.outputs) if isinstance(target, Leaf) else str(target)
        return _digest((name, args))

    def _run(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda item: env[item].make())
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _CPU}
        target: Any = node.target
        with torch.no_grad():
            return target(*args, **kwargs)


class _Key(str):
    """Stands for an operand."""

    __slots__ = ()


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def once() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return once


def _key(value: Any) -> str:
    if not isinstance(value, _Constant):
        return str(value)
    held = value.make()
    if not isinstance(held, torch.Tensor):
        return _digest(held)
    flat = held.detach().cpu().contiguous().resolve_conj().flatten()
    return _digest((tuple(held.shape), held.dtype), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _digest(item: Any, contents: bytes = b"") -> str:
    return hashlib.blake2b(repr(item).encode() + contents, digest_size=12).hexdigest()

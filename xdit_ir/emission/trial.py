"""Which nodes of a forward a CUDA graph cannot hold: found by running it once, node by node, on real values."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_ir.emission.sections import RunBy, insert_moves
from xdit_ir.emission.structure import STRUCTURE
from xdit_ir.ir.draws import is_random
from xdit_ir.ir.graphs import operands, placeholders
from xdit_ir.ir.leaf import Leaf
from xdit_ir.transport.collectives import Exchange
from xdit_ir.transport.uploads import StartUpload

SYNCHRONISING = "synchronizing CUDA operation"  # PyTorch's words where the host waits for the device


class Trial(fx.Interpreter):
    """Runs a forward and notes what it does on the host.

    `unchanging`: placeholders whose contents are the same at every call. `tried`: whether blocks wait for the device,
    by their structure and by what they are given; these are called as they are, and others are added.
    """

    def __init__(
        self, run: fx.GraphModule, unchanging: Collection[str], tried: dict[Hashable, bool] | None = None
    ) -> None:
        super().__init__(run)
        self.unchanging, self.tried = unchanging, {} if tried is None else tried
        self.reading: set[fx.Node] = set()
        self.on_host: set[fx.Node] = set()
        self.moved: list[tuple[fx.Node, fx.Node]] = []
        self.device = torch.device("cpu")
        self._fixed: set[fx.Node] = set()
        self._scalars: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """What a node gives; notes whether it waits for the device, and which operands it takes from the host."""
        result, waits = self._run(n)
        if n.op != "output":
            self._note(n, result, waits=waits)
        return result

    def _run(self, node: fx.Node) -> tuple[Any, bool]:
        """What a node gives, and whether it waits for the device. Of a block, which may talk to others and so cannot be
        begun twice, the operators are run one by one."""
        if node.op == "call_function":
            try:
                with _waiting_is_an_error():
                    return super().run_node(node), False
            except RuntimeError as error:
                if SYNCHRONISING not in str(error):
                    raise
            return super().run_node(node), True
        if node.op == "call_module" and isinstance(body := self.submodules[node.target], fx.GraphModule):
            return self._block(node, body)
        module = self.submodules.get(node.target) if node.op == "call_module" else None
        return super().run_node(node), isinstance(module, Exchange) and module.by_host

    def _block(self, node: fx.Node, body: fx.GraphModule) -> tuple[Any, bool]:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given = tuple((source in self._fixed, _devices(x)) for source, x in zip(node.args, args, strict=True))
        key = (body.meta.get(STRUCTURE), given)
        if key in self.tried:
            return super().run_node(node), self.tried[key]
        fixed = {place.name for place, (is_fixed, _) in zip(placeholders(body.graph), given, strict=True) if is_fixed}
        inside = Trial(body, fixed)
        result, waits = inside.run(*args, **kwargs), bool(inside.reading or inside.moved)
        if STRUCTURE in body.meta:
            self.tried[key] = waits
        return result, waits

    def kinds(self) -> tuple[fx.GraphModule, dict[fx.Node, RunBy]]:
        """The forward, with copies to the device of what comes from the host, and the kind of each of its nodes."""
        assert isinstance(self.module, fx.GraphModule)
        run, copies, moves = insert_moves(self.module, self.moved, self.device)
        kinds = {copies[node]: self._kind(node) for node in self.module.graph.nodes if node.op not in _ENDS}
        fixed = {copies[node] for node in self._fixed}
        kinds |= {move: RunBy.ONCE if source in fixed else RunBy.HOST for move, source in moves.items()}
        for node in reversed(run.graph.nodes):
            if kinds.get(node) is RunBy.ONCE:
                kinds |= {source: RunBy.ONCE for source in operands(node) if source in kinds}
        for node in run.graph.nodes:
            if node.target is operator.getitem and (source := operands(node)[0]) in kinds:
                kinds[node] = kinds[source]
        return run, kinds

    def _kind(self, node: fx.Node) -> RunBy:
        if node not in self.on_host and node not in self.reading:
            return RunBy.DEVICE
        return RunBy.ONCE if node in self._fixed else RunBy.HOST

    def _note(self, node: fx.Node, result: Any, *, waits: bool) -> None:
        sources = [] if self._uploads(node) else operands(node)
        here, there = _devices(result)
        if node.op == "placeholder":
            fixed = node.name in self.unchanging
        else:
            fixed = node.op == "call_function" and all(source in self._fixed for source in sources) and _pure(node)
        if fixed:
            self._fixed.add(node)
        if here:
            self.on_host.add(node)
            if all(x.dim() == 0 for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)):
                self._scalars.add(node)
        if node.op == "placeholder":
            return
        if there:
            self.device = there
        from_host = [source for source in dict.fromkeys(sources) if source in self.on_host]
        if from_host and there and not here and self._mixes(node, sources):
            self.moved += [(node, s) for s in from_host if waits or s not in self._fixed or s not in self._scalars]
        elif waits or isinstance(node.target, Leaf) or any(source not in self._fixed for source in from_host):
            self.reading.add(node)

    def _uploads(self, node: fx.Node) -> bool:
        """Whether a node reads the host's memory by a copy that a CUDA graph can hold."""
        return node.op == "call_module" and isinstance(self.submodules[node.target], StartUpload)

    def _mixes(self, node: fx.Node, sources: Sequence[fx.Node]) -> bool:
        """Whether an operator takes some values from the host and some from the device."""
        return isinstance(node.target, torch._ops.OpOverload) and any(source not in self.on_host for source in sources)


_ENDS = ("placeholder", "output")


def _pure(node: fx.Node) -> bool:
    """Whether an operator gives the same whenever it is called."""
    return not is_random(node.target) and not isinstance(node.target, Leaf)


def _devices(value: Any) -> tuple[bool, torch.device | None]:
    """Whether there are tensors on the host in a value, and a device that there are others on."""
    devices = [x.device for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    return any(one.type == "cpu" for one in devices), next((one for one in devices if one.type != "cpu"), None)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)

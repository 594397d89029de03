"""Which numbers of a body depend on the sizes that it is given, found by running it once with symbols for these.

What is found is a guess from one shape: code made by it serves those shapes whose numbers fit, and no others.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from xdit_ir.emission.sizes import Sizes, is_symbolic
from xdit_ir.emission.structure import Structure, is_value, map_numbers, sizes_of
from xdit_ir.emission.symbolic_arguments import symbolic_arguments
from xdit_ir.ir.program import SPEC

Lifted = tuple[Any, ...]


def lift(structure: Structure, device: torch.device) -> Lifted:
    """Each number of a body, or what it is in symbols, which stand for sizes that may be others."""
    tied: frozenset[int] | None = None
    while True:
        run = _Run(structure, device, tied)
        try:
            found = run.numbers()
        except Exception:  # an operator that cannot do symbols, in whatever way it says so: nothing is lifted
            return structure.numbers
        if tied is not None and (not run.misled or run.tied <= tied):
            return found
        tied = run.tied | (tied or frozenset())


class _Run(fx.Interpreter):
    """One run on fake tensors. `tied`: those numbers of placeholders that the weights are known to decide; None: that
    is to be found, so no number is taken for another that is equal to it here, as tokens may be to features."""

    def __init__(self, structure: Structure, device: torch.device, tied: Collection[int] | None) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), structure.graph), garbage_collect_values=False)
        self.device, self._given = device, tied or ()
        self._shapes = ShapeEnv(duck_shape=False)
        self._sizes = Sizes(self._symbol, trusting=tied is not None)
        self._found: list[Any] = []
        self._inputs: list[int] = []
        self._symbols = 0

    def numbers(self) -> Lifted:
        """What the numbers are."""
        mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        mode.cache_enabled = False  # nothing is computed twice
        with enable_python_dispatcher(), mode, torch.no_grad():  # some operators take symbols only as written in Python
            given = [self._input(node) for node in self.graph.nodes if node.op == "placeholder"]
            self.run(*given)
        return tuple(_expression(one) for one in self._found)

    @property
    def misled(self) -> bool:
        """Whether something was guessed of what is no symbol after all."""
        return not all(map(is_symbolic, self._sizes.guessed))

    @property
    def tied(self) -> frozenset[int]:
        """The numbers of placeholders that this run has found to be decided."""
        return frozenset(place for place in self._inputs if isinstance(_expression(self._found[place]), int))

    def run_node(self, n: fx.Node) -> Any:
        """What a node gives for symbolic sizes; its integers become what they probably stand for."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = symbolic_arguments(n.target, args, kwargs, self._sizes)
        map_numbers((args, kwargs), self._found.append)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        self._sizes.see(result)
        return result

    def _input(self, node: fx.Node) -> torch.Tensor:
        shape: list[Any] = list(sizes_of(node))
        for dim, size in enumerate(shape):
            place = len(self._found)
            if is_value(node) and size > 1 and place not in self._given:
                self._inputs.append(place)
                shape[dim] = self._symbol(size)
            self._found.append(shape[dim])
        dtype = node.meta[SPEC].dtype if SPEC in node.meta else torch.uint8
        result = torch.empty(shape, dtype=dtype, device=self.device)
        if is_value(node):
            self._sizes.see(result)
        return result

    def _symbol(self, size: int) -> Any:
        """A new one, which is `size` in this run."""
        self._symbols += 1
        source = ConstantSource(f"size_{self._symbols}")
        symbol = self._shapes.create_symbol(size, source, DimDynamic.DYNAMIC)
        return self._shapes.create_symintnode(symbol, hint=size, source=source)


def _expression(size: Any) -> Any:
    """A size as an integer, or in symbols."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = size.node.expr
    return int(found) if found.is_number else found

"""What chosen modules return, marked as what later steps may reuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdit_ir import capture
from xdit_ir.errors import StateError
from xdit_ir.ir import ops
from xdit_ir.ir.program import Program, where_of

X = torch.randn(1, 4, 8)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.relu(self.inner(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](super().forward(x)) + self.layers[0].inner(x)


def marks(program: Program) -> list[tuple[str, int]]:
    graphs = [program.graph, *(block.graph for block in program.blocks.values())]
    nodes = [node for graph in graphs for node in graph.nodes if node.target is ops.reuse]
    return [(where_of(node).module, int(node.kwargs.get("group", 0))) for node in nodes]  # type: ignore[call-overload]


def test_layers_with_the_same_marks_are_one_block() -> None:
    chosen = {f"layers.{place}.inner": 1 for place in range(3)}
    program = capture.trace(Model(), (X,), marked=chosen)
    assert len(program.blocks) == 1 and marks(program) == [("inner", 1)]


def test_layers_with_other_marks_are_others() -> None:
    program = capture.trace(Model(), (X,), marked={"layers.1.inner": 0, "layers.1.outer": 1})
    assert [(path.rpartition(".")[2], group) for path, group in marks(program)] == [("inner", 0), ("outer", 1)]


def test_a_whole_layer_is_marked_behind_its_call() -> None:
    program = capture.trace(Model(), (X,), marked={"layers.2": 0})
    assert marks(program) == [("layers.2", 0)]


def test_a_module_that_is_called_twice_is_refused() -> None:
    with pytest.raises(StateError, match=r"calls layers\.0 more than once.*expected one call"):
        capture.trace(Twice(), (X,), marked={"layers.0": 0})


def test_a_module_inside_one_that_is_called_whole_is_refused() -> None:
    with pytest.raises(StateError, match=r"layers\.1 is called whole.*expected one that can be captured"):
        capture.trace(Model(), (X,), ["layers.1"], marked={"layers.1.inner": 0})

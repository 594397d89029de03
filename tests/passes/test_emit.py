"""The emitter says what the operators give, lays it out by the rules, and refuses what they cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from xdit_ir.errors import VerifyError
from xdit_ir.ir import ops
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, TensorSpec, Where
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten
MESH = Mesh.of(ulysses=2)
ROWS = Layout.whole(2).with_dims({0: MESH.divide(6, ("ulysses",))})
COLUMNS = Layout.whole(2).with_dims({1: MESH.divide(4, ("ulysses",))})
WHERE_IT_STOOD = Where("layer", "model.py:1")


def emitter(layout: Layout | None) -> tuple[fx.Node, Emitter]:
    """A value `f32[6, 4]` of this layout, and what emits in front of an operator on it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {SPEC: TensorSpec((6, 4), torch.float32), LAYOUT: layout}
    node = graph.call_function(aten.relu.default, (x,))
    node.meta = {WHERE: WHERE_IT_STOOD}
    graph.output((node,))
    return x, Emitter(graph, node, None if layout is None else MESH)


def test_types_are_what_operators_give() -> None:
    x, emit = emitter(None)
    scaled = emit.emit(aten.mul.Tensor, x, 2)
    assert scaled.meta == {SPEC: TensorSpec((6, 4), torch.float32), WHERE: WHERE_IT_STOOD}
    assert scaled.next is emit.node
    assert emit.emit(aten.gt.Scalar, x, 0).meta[SPEC] == TensorSpec((6, 4), torch.bool)
    assert emit.emit(aten.argmax.default, x, 1).meta[SPEC] == TensorSpec((6,), torch.int64)
    parts = emit.emit(aten.split_with_sizes.default, x, [1, 3], 1)
    assert [spec.shape for spec in parts.meta[SPEC]] == [(6, 1), (6, 3)]


def test_an_integer_and_a_float_of_equal_value_give_different_types() -> None:
    x, emit = emitter(None)
    codes = emit.cast(x, torch.int64)
    types = [emit.emit(aten.add.Tensor, codes, number).meta[SPEC].dtype for number in (1, 1.0, 1)]
    assert types == [torch.int64, torch.float32, torch.int64]


def test_layouts_are_what_the_rules_infer() -> None:
    x, emit = emitter(ROWS)
    assert emit.emit(aten.relu.default, x).meta[LAYOUT] == ROWS
    assert emit.permute(x, [1, 0]).meta[LAYOUT] == ROWS.permuted([1, 0])
    total = emit.emit(aten.sum.dim_IntList, x, [0])
    assert total.meta[LAYOUT] == Layout((None,), frozenset({"ulysses"}))


def test_operands_that_an_operator_cannot_take_are_refused() -> None:
    x, emit = emitter(COLUMNS)
    with pytest.raises(VerifyError, match=r"aten.cumprod.default cannot take x in the layout that it has"):
        emit.emit(aten.cumprod.default, x, 1)
    changed = emit.relayout(x, ROWS)
    assert changed.target is ops.all_to_all
    assert emit.emit(aten.cumprod.default, changed, 1).meta[LAYOUT] == ROWS


def test_a_change_of_layout_adds_up_first_and_is_nothing_where_nothing_changes() -> None:
    x, emit = emitter(ROWS)
    assert emit.relayout(x, ROWS) is x
    total = emit.emit(aten.sum.dim_IntList, x, [0], True)
    whole = emit.relayout(total, Layout.whole(2))
    assert (whole.target, whole.args) == (ops.all_reduce, (total,))
    part = emit.relayout(total, COLUMNS)
    assert [part.target, part.args[0].target] == [ops.shard, ops.all_reduce]

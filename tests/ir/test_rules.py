"""The rules, against the operators: whatever the layouts of the operands, every rank's result is its shard."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_examples import EXAMPLES, Drawer
from ir_ranks import OneOperator
from ir_strategies import examples, layouts, meshes

from xdit_ir import ops
from xdit_ir.layout import Layout
from xdit_ir.program import LAYOUT
from xdit_ir.rules import RULES, decide, rule_for
from xdit_ir.rules.base import Call, as_outputs, operands

for family in ("pointwise", "views", "products"):
    importlib.import_module(f"ir_examples_{family}")

CASES = [pytest.param(packet, make, id=f"{packet}-{make.__name__}".removeprefix("aten.")) for packet in EXAMPLES for make in EXAMPLES[packet]]
ATTENTION = (ops.attention, ops.ring_attention)


def test_every_rule_has_an_example():
    assert not [str(packet) for packet in RULES if packet not in EXAMPLES]


@pytest.mark.parametrize(("packet", "make"), CASES)
@examples(8)
@given(st.data())
def test_every_rank_gets_its_shard(packet, make, data):
    one = OneOperator(make(Drawer(data.draw), packet))
    mesh = data.draw(meshes())
    pool = {}
    seeds = {}
    for at, place in enumerate(one.places):
        shape = one.inputs[at].shape
        seeds[place.name] = layouts(data.draw, mesh, shape, pool)
        if packet in ATTENTION and at:
            seeds[place.name] = seeds[place.name].with_dims({-2: None, -1: None})
    divided = one.propagate(mesh, seeds)
    again(mesh, divided)
    one.check(mesh, divided)


def again(mesh, divided):
    """A rule applied to what it asked for asks for the same and answers the same."""
    node = next(node for node in divided.graph.nodes if node.name == "op")
    taken = tuple(source.meta[LAYOUT] for source in operands(node))
    ruling = decide(Call(node, mesh, taken))
    assert ruling.inputs == taken
    assert ruling.outputs == node.meta[LAYOUT]


@pytest.mark.parametrize(("packet", "make"), CASES)
@examples(8)
@given(st.data())
def test_what_is_demanded_is_given(packet, make, data):
    one = OneOperator(make(Drawer(data.draw), packet))
    mesh = data.draw(meshes())
    pool = {}
    wanted = [layouts(data.draw, mesh, result.shape, pool) for result in one.results]
    if len(wanted) > 1 and len({tuple(r.shape) for r in one.results}) == 1:
        wanted = wanted[:1] * len(wanted)
    sources = operands(one.op)
    whole = tuple(Layout.whole(len(source.meta["spec"].shape)) for source in sources)
    call = Call(one.op, mesh, whole)
    rule = rule_for(one.op.target)
    assert rule is not None
    target = as_outputs(call, wanted)
    needs = rule.demand(call, target)
    if needs is not None:
        ruling = rule.forward(Call(one.op, mesh, needs))
        assert ruling.inputs == needs
        assert ruling.outputs == target
    seeds = {node.name: layout for node, layout in zip(one.picked, wanted, strict=True)}
    divided = one.propagate(mesh, seeds)
    if needs is not None and not all(layout.is_whole for layout in wanted) and len(wanted) == 1:
        node = next(node for node in divided.graph.nodes if node.name == "op")
        assert node.meta[LAYOUT] == wanted[0]
    one.check(mesh, divided)



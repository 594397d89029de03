"""The rules, against the operators: whatever the layouts of the operands, every rank's result is its shard."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_examples import EXAMPLES, Drawer
from ir_ranks import OneOperator, the_operator
from ir_strategies import examples, layouts, meshes

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.rules import RULES, infer, rule_for
from xdit_ir.rules.base import OpCall, as_outputs

for family in ("pointwise", "views", "lookups", "products"):
    importlib.import_module(f"ir_examples_{family}")

USES = Counter(make for makers in EXAMPLES.values() for make in makers)
CASES = [
    pytest.param(
        packet,
        make,
        id=f"{packet.__name__ if inspect.isfunction(packet) else packet}-{make.__name__}".removeprefix("aten."),
    )
    for packet, makers in EXAMPLES.items()
    for make in makers
]
ATTENTION = {ops.attention, ops.ring_attention}  # see test_attention.py


def test_every_rule_has_an_example():
    assert not [str(packet) for packet in RULES if packet not in EXAMPLES and packet not in ATTENTION]


@pytest.mark.parametrize(("packet", "make"), CASES)
def test_every_rank_gets_its_shard(packet, make):
    @examples_of(make)
    @given(st.data())
    def check(data):
        one = OneOperator(make(Drawer(data.draw), packet))
        mesh, pool = data.draw(meshes()), {}
        taken = [layouts(data.draw, mesh, x.shape, pool) for x in one.inputs]
        sums_come_first(one, mesh)
        divided = one.propagate(mesh, one.program(taken))
        again(mesh, divided)
        one.check(mesh, divided)

    check()


def examples_of(make):
    """Few examples for each of many operators that are alike, more for one of its own kind."""
    return examples(min(max(16 // USES[make], 2), 8))


def sums_come_first(one, mesh):
    """No rule takes an operand with a pending sum."""
    node = the_operator(one.program())
    shapes = [source.meta[SPEC].shape for source in operands(node)]
    partial = tuple(Layout((None,) * len(shape), frozenset({"ulysses"})) for shape in shapes)
    assert not any(layout.partial for layout in infer(OpCall(node, mesh, partial)).inputs)


def again(mesh, divided):
    """A rule applied to what it asked for asks for the same and answers the same."""
    node = the_operator(divided)
    taken = tuple(source.meta[LAYOUT] for source in operands(node))
    ruling = infer(OpCall(node, mesh, taken))
    assert ruling.inputs == taken
    assert ruling.outputs == node.meta[LAYOUT]


@pytest.mark.parametrize(("packet", "make"), CASES)
def test_what_is_demanded_is_given(packet, make):
    @examples_of(make)
    @given(st.data())
    def check(data):
        one = OneOperator(make(Drawer(data.draw), packet))
        mesh, pool = data.draw(meshes()), {}
        wanted = [layouts(data.draw, mesh, result.shape, pool) for result in one.results]
        if len({result.shape for result in one.results}) == 1:
            wanted = wanted[:1] * len(wanted)
        demand(one, mesh, wanted)

    check()


def demand(one, mesh, wanted):
    """What `demand` answers is confirmed by `forward`, and is where propagation cuts."""
    node = the_operator(one.program())
    whole = tuple(Layout.whole(len(source.meta[SPEC].shape)) for source in operands(node))
    target = as_outputs(OpCall(node, mesh, whole), wanted)
    rule = rule_for(node.target)
    assert rule is not None
    needs = rule.demand(OpCall(node, mesh, whole), target)
    if needs is not None:
        ruling = rule.forward(OpCall(node, mesh, needs))
        assert ruling.inputs == needs
        assert ruling.outputs == target
    divided = one.propagate(mesh, one.program(wanted=wanted))
    one.check(mesh, divided)
    if needs is not None and not any(layout.is_whole for layout in wanted):
        assert the_operator(divided).meta[LAYOUT] == target, "cuts move up through an operator that can be cut"

"""Attention: the rule before lowering, and what lowering makes of any layouts of its operands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ir_examples import Drawer, Sample
from ir_ranks import OneOperator, the_operator
from ir_strategies import examples, layouts, meshes

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.passes.lower_attention import LowerAttention
from xdit_ir.rules import rule_for
from xdit_ir.rules.base import OpCall
from xdit_ir.sharding.verify import verify


def attention(d, masks=True):
    """A call with or without batch, grouped heads, masks of any broadcastable shape."""
    batch, heads, queries, keys, width = d.shape(5, high=5)
    group = d.pick(1, 1, 2, 3)
    lead = d.pick((), (batch,), (batch,), (2, batch))
    q = d.tensor(*lead, group * heads, queries, width)
    shared = d.pick(lead, lead, (1,) * len(lead))
    k, v = (d.tensor(*shared, heads, keys, width) for _ in range(2))
    kwargs = {"scale": 0.5, "enable_gqa": group > 1}
    if masks and d.bool():
        shape = (*d.broadcast((*lead, group * heads)), d.pick(1, queries), d.pick(1, keys))
        kwargs["mask"] = d.tensor(*shape) if d.bool() else d.mask(*shape).index_fill(-1, torch.tensor(0), True)
    return Sample(ops.attention, (q, k, v), kwargs)


@examples(40)
@given(st.data())
def test_queries_heads_and_batch_are_free(data):
    one = OneOperator(attention(Drawer(data.draw)))
    mesh, pool = data.draw(meshes()), {}
    taken = [layouts(data.draw, mesh, x.shape, pool) for x in one.inputs]
    for place, layout in enumerate(taken[1:], start=1):
        taken[place] = layout.with_dims({-2: None, -1: None})
    if len(taken) > 3 and one.inputs[3].shape[-2] != 1:
        taken[0] = taken[0].with_dims({-2: None})
    divided = one.propagate(mesh, one.program(taken))
    one.check(mesh, divided)


@examples(40)
@given(st.data())
def test_lowering_is_exact_for_any_layouts(data):
    one = OneOperator(attention(Drawer(data.draw)))
    mesh, pool = data.draw(meshes(8)), {}
    taken = [layouts(data.draw, mesh, x.shape, pool) for x in one.inputs]
    lowered = LowerAttention(mesh).apply(one.program(taken))
    verify(lowered, runnable=True)
    one.check(mesh, lowered)


@examples(25)
@given(st.data())
def test_causal_attention_keeps_the_natural_order(data):
    d = Drawer(data.draw)
    batch, heads, tokens, width = d.shape(4, high=5)
    group = d.pick(1, 1, 2)
    q, k, v = (d.tensor(batch, count, tokens, width) for count in (group * heads, heads, heads))
    one = OneOperator(Sample(ops.attention, (q, k, v), {"is_causal": True, "enable_gqa": group > 1}))
    mesh, pool = data.draw(meshes(8)), {}
    taken = [layouts(data.draw, mesh, x.shape, pool) for x in one.inputs]
    lowered = LowerAttention(mesh).apply(one.program(taken))
    verify(lowered, runnable=True)
    one.check(mesh, lowered)


@examples(25)
@given(st.data())
def test_what_is_demanded_of_attention_is_given(data):
    one = OneOperator(attention(Drawer(data.draw)))
    mesh = data.draw(meshes())
    wanted = layouts(data.draw, mesh, one.results[0].shape)
    node = the_operator(one.program())
    whole = tuple(Layout.whole(len(source.meta[SPEC].shape)) for source in operands(node))
    rule = rule_for(ops.attention)
    assert rule is not None
    needs = rule.demand(OpCall(node, mesh, whole), wanted)
    assert needs is not None or wanted.dims[-1] is not None or wanted.dims[-3] is not None
    if needs is not None:
        ruling = rule.forward(OpCall(node, mesh, needs))
        assert (ruling.inputs, ruling.outputs) == (needs, wanted)


@pytest.mark.parametrize(
    ("degrees", "names"),
    [
        ({"ulysses": 2}, {"attention"}),
        ({"ring": 2}, {"ring_attention"}),
        ({"ring": 2, "ulysses": 2}, {"ring_attention"}),
    ],
)
def test_tokens_become_heads_or_go_around(degrees, names):
    mesh = Mesh.of(**degrees)
    d = Drawer(lambda strategy: 0)
    q, k, v = (d.tensor(1, 4, 7, 3) for _ in range(3))
    one = OneOperator(Sample(ops.attention, (q, k, v), {}))
    tokens = Layout.whole(4).with_dims({2: mesh.divide(7, degrees)})
    lowered = LowerAttention(mesh).apply(one.program([tokens] * 3))
    node = the_operator(lowered)
    assert {node.target.__name__} == names
    assert node.meta[LAYOUT].dividing_dims(mesh) == set(degrees)
    heads = node.meta[LAYOUT].dims[1]
    assert mesh.dividing_dims(heads) == {"ulysses"} & set(degrees)
    one.check(mesh, lowered)


def test_ranks_share_a_head_of_keys():
    mesh = Mesh.of(ulysses=4)
    d = Drawer(lambda strategy: 0)
    q, k, v = (d.tensor(1, heads, 64, 3) for heads in (4, 2, 2))
    one = OneOperator(Sample(ops.attention, (q, k, v), {"enable_gqa": True}))
    tokens = Layout.whole(4).with_dims({2: mesh.divide(64, ("ulysses",))})
    lowered = LowerAttention(mesh).apply(one.program([tokens] * 3))
    keys = operands(the_operator(lowered))[1].meta[LAYOUT].dims[1]
    assert [part.runs for part in keys.parts] == [((0, 1),), ((0, 1),), ((1, 1),), ((1, 1),)]
    one.check(mesh, lowered)

"""A planned change of layout takes any layout to any other, and moves no more than it must."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from ir_strategies import examples, layouts, meshes, shard

from xdit_ir.ir.collective_ops import pack, unpack
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.relayout import kind, plan


def exchange(mesh, shape, source, target):
    """Run all ranks' halves of a change of layout, and check every rank's result."""
    value = torch.arange(math.prod(shape)).reshape(shape)
    steps = plan(mesh, shape, source, target)
    sent = [pack(shard(value, source, rank), steps.ranks[rank]) for rank in range(mesh.world_size)]
    for rank, mine in enumerate(steps.ranks):
        assert mine.group == mesh.group(rank, steps.mesh_dims)
        pieces = [sent[peer][steps.ranks[peer].group.index(rank)] for peer in mine.group]
        assert tuple(tuple(piece.shape) for piece in pieces) == mine.shapes
        assert [piece.shape for piece in sent[rank]] == [torch.Size(piece.shape) for piece in mine.sends]
        wanted = shard(value, target, rank)
        assert mine.shape == tuple(wanted.shape)
        assert torch.equal(unpack(pieces, mine), wanted)
    return steps


def missing(mesh, shape, source, target):
    """How many elements each rank wants and does not hold."""
    value = torch.arange(math.prod(shape)).reshape(shape)
    shards = ((shard(value, layout, rank) for layout in (source, target)) for rank in range(mesh.world_size))
    return [int((~torch.isin(wanted, held)).sum()) for held, wanted in shards]


SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)


@examples(250)
@given(meshes(8), SHAPES, st.data())
def test_any_layout_becomes_any_other(mesh, shape, data):
    pool = {}
    source, target = (layouts(data.draw, mesh, shape, pool) for _ in range(2))
    steps = exchange(mesh, shape, source, target)
    missed = missing(mesh, shape, source, target)
    assert sum(steps.sent(4)) == 4 * sum(missed), "an element travels once to each rank that lacks it"
    assert (steps.kind == "shard") == (not steps.mesh_dims)
    assert steps.kind != "shard" or not any(missed)
    assert (steps.kind, steps.mesh_dims) == kind(mesh, source, target)


@examples(100)
@given(meshes(8), SHAPES, st.data())
def test_names_say_what_is_needed(mesh, shape, data):
    layout = layouts(data.draw, mesh, shape, kinds="uneven shuffled")
    whole = Layout.whole(len(shape))
    assert kind(mesh, layout, layout) == kind(mesh, whole, layout) == ("shard", ())
    name, dims = kind(mesh, layout, whole)
    assert name == ("gather" if dims else "shard")
    assert set(dims) <= layout.dividing_dims(mesh)


def over(mesh, size, *dims):
    return mesh.divide(size, dims)


def test_names_of_the_usual_changes():
    mesh = Mesh.of(ring=2, ulysses=2)
    tokens = Layout((over(mesh, 8, "ring", "ulysses"), None))
    assert kind(mesh, tokens, Layout((over(mesh, 8, "ring"), None))) == ("gather", ("ulysses",))
    heads = Layout((mesh.gathered(tokens.dims[0], ("ulysses",)), over(mesh, 4, "ulysses")))
    assert kind(mesh, tokens, heads) == ("all_to_all", ("ulysses",))
    assert kind(mesh, heads, tokens) == ("all_to_all", ("ulysses",))
    assert kind(mesh, tokens, Layout((None, over(mesh, 4, "ulysses")))) == ("all_to_all", ("ring", "ulysses"))
    rows = Layout((over(mesh, 8, "ring"), None))
    halo = Partition(8, tuple(Indices.range(*((0, 5), (3, 8))[rank // 2]) for rank in range(4)))
    assert kind(mesh, rows, Layout((halo, None))) == ("halo_exchange", ("ring",))
    assert kind(mesh, Layout((halo, None)), rows) == ("shard", ())


def test_a_layout_knows_when_it_is_whole():
    mesh = Mesh.of(ulysses=2)
    assert Layout((mesh.divide(4, ("ring",)), mesh.divide(0, ("ulysses",)))) == Layout.whole(2)
    divided = Layout((mesh.divide(3, ("ulysses",)), None))
    assert not divided.is_whole and divided.dividing_dims(mesh) == {"ulysses"}
    assert [divided.local_shape((3, 5), rank) for rank in (0, 1)] == [(2, 5), (1, 5)]
    assert divided.with_dims({-2: None}).is_whole
    partial = Layout((None,), frozenset({"ulysses"}))
    assert not partial.is_whole and partial.summed().is_whole


@examples(60)
@given(meshes(8), SHAPES, st.data())
def test_there_and_back(mesh, shape, data):
    one, other = (layouts(data.draw, mesh, shape) for _ in range(2))
    exchange(mesh, shape, one, other)
    exchange(mesh, shape, other, one)

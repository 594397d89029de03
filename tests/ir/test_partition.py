"""The algebra of index sets, against plain lists of integers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_strategies import KINDS, examples, mesh_dims, meshes, of, partitions, pieces

from xdit_ir.ir import partition
from xdit_ir.ir.mesh import MESH_DIMS, Mesh
from xdit_ir.ir.partition import Indices, Partition, even_cuts, even_pieces

SIZES = st.integers(0, 24)


@st.composite
def indices(draw, size=24):
    """Distinct indices below `size`, often in runs."""
    parts = draw(pieces(draw(st.integers(0, size)), draw(st.integers(1, 4)), KINDS))
    return parts[draw(st.integers(0, len(parts) - 1))]


def listed(some: Indices) -> list[int]:
    return some.array.tolist()


@examples(100)
@given(st.lists(st.integers(0, 30), unique=True))
def test_indices_hold_what_they_were_made_of(values):
    some = of(values)
    assert listed(some) == values
    assert some.size == len(values)
    assert all(length > 0 for _, length in some.runs)
    assert all(sum(a) != b[0] for a, b in itertools.pairwise(some.runs)), "runs are maximal"
    assert (
        Indices.of_runs(some.runs)
        == some
        == Indices.of_runs((start + i, 1) for start, n in some.runs for i in range(n))
    )
    assert hash(some) == hash(of(values))
    assert some.is_whole(len(values)) == (values == list(range(len(values))))


@examples(100)
@given(indices(), indices(), st.integers(0, 9))
def test_set_operations(one, other, by):
    a, b = listed(one), listed(other)
    assert listed(one.within(other)) == [i for i in a if i in b]
    assert listed(one.without(other)) == [i for i in a if i not in b]
    assert listed(one.shift(by)) == [i + by for i in a]
    assert listed(one.map(lambda array: 3 * array + 1)) == [3 * i + 1 for i in a]
    assert listed(one.shift(100).concat(other)) == [i + 100 for i in a] + b


@examples(100)
@given(indices(), indices())
def test_many_runs_are_as_few(one, other):
    """By arrays, from so many runs on, as by loops."""
    few = one.within(other), one.without(other), one.places_in(other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "MANY", -1)
        assert (one.within(other), one.without(other), one.places_in(other)) == few


@examples(100)
@given(indices(), st.data())
def test_positions_find_what_is_held(some, data):
    values = listed(some)
    wanted = data.draw(st.permutations(values)) if values else []
    wanted = wanted[: data.draw(st.integers(0, len(wanted)))]
    places = some.positions(of(wanted))
    assert [values[i] for i in listed(places)] == wanted
    assert listed(some.at(places)) == wanted


@examples(100)
@given(indices(), st.integers(0, 24), st.integers(0, 24), st.integers(1, 4))
def test_select_is_a_slice(some, start, stop, step):
    kept, places = some.select(start, stop, step)
    wanted = list(range(start, stop, step))
    values = listed(some)
    assert [values[i] for i in listed(places)] == [i for i in values if i in wanted]
    assert [wanted[i] for i in listed(kept)] == [i for i in values if i in wanted]
    assert listed(places) == sorted(listed(places))


@examples(100)
@given(indices(8), st.integers(1, 6), st.data())
def test_outer_is_the_row_major_product_and_factor_its_inverse(rows, width, data):
    columns = of(data.draw(st.permutations(range(width)))[: data.draw(st.integers(1, width))])
    product = rows.outer(columns, width)
    assert listed(product) == [r * width + c for r in listed(rows) for c in listed(columns)]
    assert product.factor(width) == (rows, columns) or not rows.size


@examples(200)
@given(indices(24), st.integers(1, 6))
def test_factor_finds_a_product_or_there_is_none(some, width):
    pair = some.factor(width)
    if pair is not None:
        assert pair[0].outer(pair[1], width) == some
    else:
        rows = list(dict.fromkeys(i // width for i in listed(some)))
        columns = list(dict.fromkeys(i % width for i in listed(some)))
        assert listed(some) != [r * width + c for r in rows for c in columns]


@examples(100)
@given(SIZES, st.integers(1, 6), st.integers(1, 4), st.data())
def test_even_pieces_cover_exactly_and_evenly(size, count, unit, data):
    first = data.draw(st.integers(0, size))
    segments = data.draw(st.sampled_from([(), (first, size - first)])) if size else ()
    parts = even_pieces(size, count, unit, segments)
    assert sorted(i for part in parts for i in listed(part)) == list(range(size))
    offset = 0
    for length in segments or (size,):
        step = unit if length % unit == 0 else 1
        own = [[i for i in listed(part) if offset <= i < offset + length] for part in parts]
        counts = [len(part) for part in own]
        assert all(n % step == 0 for n in counts)
        assert max(counts) - min(counts) <= step
        assert counts == sorted(counts, reverse=True)
        assert [i for part in own for i in part] == list(range(offset, offset + length))
        offset += length


def test_sets_of_large_sizes_are_worked_out_by_runs():
    """As for a flat buffer of weights, whose indices nobody can list."""
    size = 10**12
    whole, half, holes = Indices.range(0, size), Indices.range(0, size // 2), Indices(((9, 4), (size // 2 - 3, 7)))
    assert whole.without(half) == Indices.range(size // 2, size) and half.within(whole) == half
    assert holes.within(half) == Indices(((9, 4), (size // 2 - 3, 3)))
    assert holes.without(half) == Indices(((size // 2, 4),)) and holes.places_in(half) == Indices.range(0, 7)
    assert whole.without(holes).size == size - 11


def test_even_pieces_refuses_segments_of_another_size():
    with pytest.raises(ValueError, match="add up"):
        even_pieces(7, 2, segments=(3, 3))


def test_cuts_put_the_longer_pieces_first():
    assert even_cuts(10, 4) == (0, 3, 6, 8, 10)
    assert even_cuts(2, 4) == (0, 1, 2, 2, 2)
    assert even_cuts(0, 2) == (0, 0, 0)


@examples(100)
@given(meshes(), SIZES, st.data())
def test_partition_covers_and_tiles(mesh, size, data):
    dims = data.draw(mesh_dims(mesh))
    partition = data.draw(partitions(mesh, size, dims))
    assert partition.sizes == tuple(len(listed(part)) for part in partition.parts)
    for rank in range(mesh.world_size):
        group = mesh.group(rank, dims)
        held = [i for member in group for i in listed(partition.parts[member])]
        assert partition.covers(group)
        if dims:
            assert partition.tiles(group) == (len(held) == size)
    assert mesh.dividing_dims(partition) <= set(dims)
    same = Partition(size, tuple(of(listed(part)) for part in partition.parts))
    assert same == partition and hash(same) == hash(partition)


@examples(100)
@given(meshes(), SIZES, st.data())
def test_gathering_joins_the_parts_of_a_group_once(mesh, size, data):
    names = data.draw(mesh_dims(mesh))
    partition = data.draw(partitions(mesh, size, names))
    over = data.draw(mesh_dims(mesh))
    gathered = mesh.gathered(partition, over)
    for rank in range(mesh.world_size):
        group = mesh.group(rank, over)
        wanted = list(dict.fromkeys(i for member in group for i in listed(partition.parts[member])))
        assert (list(range(size)) if gathered is None else listed(gathered.parts[rank])) == wanted


@examples(100)
@given(meshes(), SIZES, st.data())
def test_refining_divides_every_part(mesh, size, data):
    names = data.draw(mesh_dims(mesh))
    partition = data.draw(partitions(mesh, size, names))
    over = frozenset(data.draw(mesh_dims(mesh)))
    refined = mesh.refine(partition, over)
    rest = over - mesh.dividing_dims(partition)
    for rank in range(mesh.world_size):
        group = mesh.group(rank, rest)
        assert [i for member in group for i in listed(refined.parts[member])] == listed(partition.parts[rank])
    if mesh.tiles(partition):
        assert mesh.tiles(refined)
    assert mesh.refine(refined, over) == refined


@examples(50)
@given(meshes(8))
def test_groups_and_places(mesh):
    for size in range(len(MESH_DIMS) + 1):
        for dims in itertools.combinations(MESH_DIMS, size):
            for rank in range(mesh.world_size):
                group = mesh.group(rank, dims)
                assert rank in group and len(group) == mesh.size(dims)
                assert [mesh.index(member, dims) for member in group] == list(range(len(group)))


def test_ranks_are_numbered_from_the_inner_dim():
    mesh = Mesh.of(cfg=2, ring=2, ulysses=2)
    assert mesh.group(0, ("ulysses",)) == (0, 1)
    assert mesh.group(0, ("ring",)) == (0, 2)
    assert mesh.group(1, ("cfg",)) == (1, 5)

"""Corners that random layouts seldom hit: each was a way to be wrong."""

from __future__ import annotations

import pytest
import torch
from ir_examples import Sample, aten
from ir_ranks import OneOperator, the_operator

from xdit_ir.ir import ops, window_ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.partition import Indices, Partition
from xdit_ir.ir.program import LAYOUT, SPEC
from xdit_ir.sharding.specialize import Specialize

TWO = Mesh.of(ulysses=2)
FOUR = Mesh.of(ring=2, ulysses=2)


def t(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def even(size, mesh=TWO, dims=("ulysses",)):
    return mesh.divide(size, dims)


def halo(size, reach=1):
    """Two halves that overlap."""
    half = size // 2
    return Partition(size, (Indices.range(0, half + reach), Indices.range(half - reach, size)))


def run(sample, *taken, mesh=TWO):
    """Run the operator for operands in these layouts; the layouts that it took and gave."""
    one = OneOperator(sample)
    program = one.propagate(mesh, one.program(taken))
    one.check(mesh, program)
    node = the_operator(program)
    return tuple(source.meta[LAYOUT] for source in operands(node)), node.meta[LAYOUT]


def test_a_sum_counts_what_several_ranks_hold_once():
    taken, given = run(Sample(aten.sum.dim_IntList, (t(8, 3), [0])), Layout((halo(8), None)))
    assert taken == (Layout((even(8), None)),) and given == Layout((None,), frozenset({"ulysses"}))
    _, given = run(Sample(aten.sum.dim_IntList, (t(8, 3), [0])), Layout((even(8), None)))
    assert given == Layout((None,), frozenset({"ulysses"}))


def test_a_product_contracts_what_several_ranks_hold_once():
    operand = Layout((None, halo(8)))
    taken, given = run(Sample(aten.mm.default, (t(3, 8), t(8, 5))), operand, Layout.whole(2))
    assert taken == (Layout((None, even(8))), Layout((even(8), None)))
    assert given == Layout((None, None), frozenset({"ulysses"}))


@pytest.mark.parametrize("target", [aten.squeeze.dim, aten.select.int])
def test_a_dim_of_length_one_that_only_one_rank_has(target):
    args = (t(4, 1), 1, *((0,) if target is aten.select.int else ()))
    _, given = run(Sample(target, args), Layout((None, even(1))))
    assert given == Layout.whole(1)


def test_expanding_a_dim_of_length_one_that_only_one_rank_has():
    taken, given = run(Sample(aten.expand.default, (t(1, 4), [3, 4])), Layout((even(1), None)))
    assert taken == (Layout.whole(2),) and given == Layout.whole(2)


def test_broadcasting_a_dim_of_length_one_that_only_one_rank_has():
    taken, given = run(Sample(aten.add.Tensor, (t(1, 4), t(3, 4))), Layout((even(1), None)), Layout.whole(2))
    assert taken == (Layout.whole(2),) * 2 and given == Layout.whole(2)


def test_convolution_over_few_rows_is_not_divided_in_an_unclear_way():
    few = Layout((None, None, Partition(8, (Indices.range(0, 7), Indices.range(7, 8)))))
    weight = t(2, 2, 3)
    args = (t(1, 2, 8), weight, None, [1], [1], [1], 1)
    taken, given = run(Sample(aten.conv1d.default, args), few, Layout.whole(3))
    assert taken[0] == Layout.whole(3) and given == Layout.whole(3)


def test_convolution_asks_for_a_halo_and_no_more():
    rows = Layout((None, None, even(8)))
    args = (t(1, 2, 8), t(2, 2, 3), None, [1], [1], [1], 1)
    taken, given = run(Sample(aten.conv1d.default, args), rows, Layout.whole(3))
    assert taken[0] == Layout((None, None, Partition(8, (Indices.range(0, 5), Indices.range(3, 8)))))
    assert given == rows
    taken, given = run(Sample(aten.conv1d.default, args), taken[0], Layout.whole(3))
    assert given == rows, "a halo that is there already is used"


def test_strided_convolution_leaves_no_row_without_an_owner():
    args = (t(1, 1, 11), t(1, 1, 2), None, [3], [0], [1], 1)
    taken, given = run(Sample(aten.conv1d.default, args), Layout((None, None, even(11))), Layout.whole(3))
    partition = taken[0].dims[2]
    assert partition is not None and partition.covers((0, 1))
    assert given.dims[2] is not None


def test_a_convolution_without_rows_on_a_rank():
    empty = Partition(9, (Indices.range(0, 9), Indices(())))
    args = (t(1, 2, 9), t(2, 2, 3), t(2), [1], [0], [1], 1)
    _, given = run(Sample(aten.conv1d.default, args), Layout((None, None, empty)), Layout.whole(3), Layout.whole(1))
    assert given.dividing_dims(TWO) == {"ulysses"}


@pytest.mark.parametrize(
    ("sample", "kwargs"),
    [
        (Sample(aten._to_copy.default, (t(8),), {"device": torch.device("meta")}), {"device": torch.device("meta")}),
        (Sample(aten.mul.Tensor, (t(), t(8).to("meta"))), {}),
    ],
)
def test_a_part_without_elements_is_on_the_device_of_the_result(sample, kwargs):
    nothing = Layout((Partition(8, (Indices.range(0, 8), Indices(()))),))
    one = OneOperator(sample)
    taken = [nothing if x.dim() else Layout.whole(0) for x in one.inputs]
    here = Specialize(1).apply(one.propagate(TWO, one.program(taken)))
    made = next(node for node in here.graph.nodes if node.target is aten.new_empty.default)
    assert made.kwargs == {"dtype": torch.float64, **kwargs}
    assert operands(made)[0].meta[SPEC].shape, "a scalar may be elsewhere"


def test_joining_operands_that_are_divided_over_different_mesh_dims():
    one, other = even(4, FOUR, ("ring",)), even(6, FOUR, ("ulysses",))
    taken, given = run(Sample(aten.cat.default, ([t(4), t(6)], 0)), Layout((one,)), Layout((other,)), mesh=FOUR)
    assert all(layout.dividing_dims(FOUR) == {"ring", "ulysses"} for layout in (*taken, given))
    assert FOUR.tiles(given.dims[0]), "nothing is held twice: attention over it would count that twice"


def test_joining_prefers_the_division_of_the_larger_operand():
    heads, tokens = Layout((None, even(4))), Layout((even(64), None))
    taken, given = run(Sample(aten.cat.default, ([t(2, 4), t(64, 4)], 0)), heads, tokens)
    assert taken[1] == tokens and given.dims[1] is None


def test_a_slope_per_channel_goes_with_the_channels():
    _, given = run(Sample(aten.prelu.default, (t(2, 4, 4), t(4))), Layout((None, None, even(4))), Layout.whole(1))
    assert given == Layout((None, None, even(4)))
    taken, _ = run(Sample(aten.prelu.default, (t(2, 4, 4), t(4))), Layout((None, even(4), None)), Layout.whole(1))
    assert taken[1] == Layout((even(4),))


def test_padding_belongs_to_the_rank_at_the_edge():
    _, given = run(Sample(aten.constant_pad_nd.default, (t(3, 8), [2, 1])), Layout((None, even(8))))
    assert given == Layout((None, Partition(11, (Indices.range(0, 6), Indices.range(6, 11)))))
    mixed = Partition(4, (Indices(((1, 1), (0, 1))), Indices.range(2, 4)))
    taken, _ = run(Sample(aten.constant_pad_nd.default, (t(4), [1, 0])), Layout((mixed,)))
    assert taken == (Layout.whole(1),), "the first index is not at the edge of its part"


def test_selecting_brings_one_row_and_not_all():
    taken, given = run(Sample(aten.select.int, (t(8, 3), 0, 5)), Layout((even(8), None)))
    assert taken[0].dims[0] == Partition(8, (Indices(((0, 4), (5, 1))), Indices.range(4, 8)))
    assert given == Layout.whole(1)


def test_a_source_that_is_divided_divides_what_it_is_written_into():
    sample = Sample(aten.slice_scatter.default, (t(10, 3), 9 + t(7, 3), 0, 1, 8))
    _, given = run(sample, Layout.whole(2), Layout((even(7), None)))
    parts = Indices.of_runs([(0, 5), (8, 1)]), Indices.of_runs([(5, 3), (9, 1)])
    assert given.dims[0] == Partition(10, parts)


def test_statistics_of_a_batch_need_all_of_it():
    args = (t(4, 3), None, None, None, None, True, 0.1, 1e-5, False)
    taken, _ = run(Sample(aten.batch_norm.default, args), Layout((even(4), None)))
    assert taken == (Layout.whole(2),)
    args = (t(4, 3), None, None, t(3), t(3) ** 2, True, 0.1, 1e-5, False)
    taken, _ = run(Sample(aten.batch_norm.default, args), Layout((even(4), None)), *[Layout.whole(1)] * 2)
    assert taken[0] == Layout.whole(2)


def test_a_mask_is_never_divided_twice_over_a_mesh_dim():
    heads, rows = even(2, FOUR), even(4, FOUR, ("ring",))
    mask = Layout((None, even(4, FOUR), None))
    one = OneOperator(Sample(ops.attention, (t(2, 4, 3), t(2, 5, 3), t(2, 5, 3), t(2, 4, 5))))
    program = one.propagate(FOUR, one.program([Layout((heads, rows, None)), *[Layout.whole(3)] * 2, mask]))
    assert operands(the_operator(program))[3].meta[LAYOUT] == Layout((heads, None, None))


def test_flip_and_roll_along_a_divided_dim_talk_to_nobody():
    tokens = Layout((even(8), None))
    for sample in (Sample(aten.flip.default, (t(8, 3), [0, 1])), Sample(aten.roll.default, (t(8, 3), [3, 1], [0, 1]))):
        taken, given = run(sample, tokens)
        assert taken == (tokens,) and given.dividing_dims(TWO) == {"ulysses"}


def test_gathering_along_a_dim_where_the_index_is_shorter():
    index = torch.zeros(2, 3, dtype=torch.int64)
    _, given = run(Sample(aten.gather.default, (t(4, 6), 1, index)), Layout((even(4), None)), Layout((even(2), None)))
    assert given == Layout.whole(2)


def test_an_ellipsis_and_a_contracted_division():
    both = Layout((None, None, even(8)))
    sample = Sample(aten.einsum.default, ("...i,...i->...", [t(2, 3, 8), t(2, 3, 8)]))
    _, given = run(sample, both, both)
    assert given == Layout((None, None), frozenset({"ulysses"}))


@pytest.mark.parametrize("rows", [(0, 0), (1, 1), (1, 0), (0, 2), (-1, -1), (-1, 1)])
@pytest.mark.parametrize("columns", [(0, 0), (2, 2), (2, 1)])
def test_convolutions_that_are_padded_unlike_on_both_sides(rows, columns):
    x, weight = t(1, 3, 6, 7), t(4, 3, 3, 3)
    got = window_ops.padded_conv(x, weight, None, (1, 2), (rows, columns), (1, 1), 1)
    padded = torch.nn.functional.pad(x, (*columns, *rows))
    assert torch.allclose(got, torch.nn.functional.conv2d(padded, weight, stride=(1, 2)))

"""A divided batch passes through: no operator that treats samples alike may gather it."""

from __future__ import annotations

import pytest
import torch
from ir_examples import Sample, aten
from ir_ranks import OneOperator, the_operator

from xdit_ir.ir import ops
from xdit_ir.ir.graphs import operands
from xdit_ir.ir.layout import Layout
from xdit_ir.ir.mesh import Mesh
from xdit_ir.ir.program import LAYOUT

MESH = Mesh.of(cfg=2)
BATCH = 4
D = torch.Generator().manual_seed(0)


def t(*shape):
    return torch.randn(shape, generator=D, dtype=torch.float64)


def i(high, *shape):
    return torch.randint(0, high, shape, generator=D)


X, Y, IMAGE, ROWS = t(4, 6, 8), t(4, 6, 8), t(4, 6, 8, 8), i(6, 4, 6, 8)
MASK = X > 0
COMPLEX = torch.view_as_complex(t(4, 6, 8, 2))
WEIGHT, CHANNELS, TABLE = t(8, 8), t(6), t(9, 5)

# A call, and which of its tensors have the batch in front (default: the first one).
CALLS = [
    (Sample(aten.softmax.int, (X, -1)), [0]),
    (Sample(aten.cumsum.default, (X, 1)), [0]),
    (Sample(aten.topk.default, (X, 3, 1)), [0]),
    (Sample(aten.sort.default, (X, -1)), [0]),
    (Sample(aten.argmax.default, (X, -1)), [0]),
    (Sample(aten.logsumexp.default, (X, [-1])), [0]),
    (Sample(aten.std.correction, (X, [1, 2])), [0]),
    (Sample(aten.var_mean.correction, (X, [1])), [0]),
    (Sample(aten.linalg_vector_norm.default, (X, 2, [-1], True)), [0]),
    (Sample(aten.max.dim, (X, 1)), [0]),
    (Sample(aten.masked_fill.Scalar, (X, MASK, 0.0)), [0, 1]),
    (Sample(aten.where.self, (MASK, X, Y)), [0, 1, 2]),
    (Sample(aten.gather.default, (X, 1, ROWS)), [0, 1]),
    (Sample(aten.scatter.src, (X, 1, ROWS, Y)), [0, 1, 2]),
    (Sample(aten.scatter_add.default, (X, 1, ROWS, Y)), [0, 1, 2]),
    (Sample(aten.take_along_dim.default, (X, ROWS, 1)), [0, 1]),
    (Sample(aten.index_select.default, (X, 1, i(6, 3))), [0]),
    (Sample(aten.index.Tensor, (X, [None, i(6, 3)])), [0]),
    (Sample(aten.index.Tensor, (X, [None, None, i(8, 3)])), [0]),
    (Sample(aten.index.Tensor, (X, [None, i(2, 6) == 0])), [0]),
    (Sample(aten.index_put.default, (X, [None, i(6, 3)], t(4, 3, 8))), [0, 2]),
    (Sample(aten.index_put.default, (X, [None, i(2, 6, 8) == 0], t())), [0]),
    (Sample(aten.index_add.default, (X, 1, i(6, 3), t(4, 3, 8))), [0, 2]),
    (Sample(aten.embedding.default, (TABLE, i(9, 4, 6))), [1]),
    (Sample(aten.one_hot.default, (i(9, 4, 6),)), [0]),
    (Sample(aten.layer_norm.default, (X, [8])), [0]),
    (Sample(aten.rms_norm.default, (X, [8])), [0]),
    (Sample(aten.group_norm.default, (IMAGE, 3, CHANNELS, CHANNELS)), [0]),
    (Sample(aten.native_group_norm.default, (IMAGE, CHANNELS, CHANNELS, 4, 6, 64, 3, 1e-5)), [0]),
    (Sample(aten.batch_norm.default, (IMAGE, None, None, CHANNELS, CHANNELS**2, False, 0.1, 1e-5, False)), [0]),
    (Sample(aten.instance_norm.default, (IMAGE, None, None, None, None, True, 0.1, 1e-5, False)), [0]),
    (Sample(aten.linear.default, (X, WEIGHT)), [0]),
    (Sample(aten.matmul.default, (X, Y.mT)), [0, 1]),
    (Sample(aten.bmm.default, (X, Y.mT)), [0, 1]),
    (Sample(aten.baddbmm.default, (t(1, 6, 6), X, Y.mT)), [1, 2]),
    (Sample(aten.einsum.default, ("b...d,bed->b...e", [X, Y])), [0, 1]),
    (Sample(aten.conv2d.default, (IMAGE, t(5, 6, 3, 3))), [0]),
    (Sample(aten.conv_transpose2d.input, (IMAGE, t(6, 5, 2, 2), None, [2, 2])), [0]),
    (Sample(aten.upsample_nearest2d.vec, (IMAGE, None, [2.0, 2.0])), [0]),
    (Sample(aten.upsample_bilinear2d.default, (IMAGE, [5, 5], False)), [0]),
    (Sample(aten.avg_pool2d.default, (IMAGE, [2, 2])), [0]),
    (Sample(aten.adaptive_avg_pool2d.default, (IMAGE, [1, 1])), [0]),
    (Sample(aten.pixel_shuffle.default, (t(4, 8, 3, 3), 2)), [0]),
    (Sample(aten.constant_pad_nd.default, (X, [0, 1, 2, 0])), [0]),
    (Sample(aten.pad.default, (IMAGE, [1, 1, 1, 1], "reflect")), [0]),
    (Sample(aten.im2col.default, (IMAGE, [2, 2], [1, 1], [0, 0], [2, 2])), [0]),
    (Sample(aten.grid_sampler.default, (IMAGE, t(4, 5, 5, 2), 0, 0, False)), [0, 1]),
    (Sample(aten.fft_rfftn.default, (X, None, [1, 2])), [0]),
    (Sample(aten._fft_c2c.default, (COMPLEX, [2], 0, True)), [0]),
    (Sample(aten.unfold.default, (X, 2, 2, 2)), [0]),
    (Sample(aten.triu.default, (X,)), [0]),
    (Sample(aten.diagonal.default, (X, 0, 1, 2)), [0]),
    (Sample(aten.select_scatter.default, (X, t(4, 8), 1, 2)), [0, 1]),
    (Sample(aten.slice_scatter.default, (X, t(4, 2, 8), 1, 2, 4)), [0, 1]),
    (Sample(aten.flip.default, (X, [1])), [0]),
    (Sample(aten.roll.default, (IMAGE, [1, 2], [2, 3])), [0]),
    (Sample(aten.repeat_interleave.self_Tensor, (X, i(3, 6), 1)), [0]),
    (Sample(aten.view.dtype, (X, torch.int32)), [0]),
    (Sample(aten.glu.default, (X, -1)), [0]),
    (Sample(aten.cosine_similarity.default, (X, Y, -1)), [0, 1]),
    (Sample(aten.stack.default, ([X, Y], 1)), [0, 1]),
    (Sample(aten.unbind.int, (X, 1)), [0]),
    (Sample(aten.mean.dim, (X, [1])), [0]),
    (Sample(aten.new_zeros.default, (X, [2])), []),
]


@pytest.mark.parametrize(("sample", "batched"), [pytest.param(*case, id=str(case[0].target)) for case in CALLS])
def test_a_divided_batch_stays_divided(sample, batched):
    one = OneOperator(sample)
    divided = MESH.divide(BATCH, ("cfg",))
    wholes = [Layout.whole(x.dim()) for x in one.inputs]
    taken = [layout.with_dims({0: divided}) if at in batched else layout for at, layout in enumerate(wholes)]
    program = one.propagate(MESH, one.program(taken))
    node = the_operator(program)
    assert all(source.op == "placeholder" or source.target is ops.shard for source in operands(node)), (
        "nothing is gathered"
    )
    layouts = node.meta[LAYOUT]
    for layout, result in zip(layouts if one.several else [layouts], one.results, strict=True):
        assert not batched or layout == Layout.whole(result.dim()).with_dims({0: divided})
    one.check(MESH, program)


def test_a_view_that_cannot_divide_the_tokens_keeps_the_batch_divided():
    mesh = Mesh.of(cfg=2, ulysses=2)
    batch, tokens = mesh.divide(4, ("cfg",)), mesh.divide(6, ("ulysses",))
    one = OneOperator(Sample(aten.reshape.default, (t(4, 6), [12, 2])))
    program = one.propagate(mesh, one.program([Layout((batch, tokens))]))
    node = the_operator(program)
    assert operands(node)[0].meta[LAYOUT] == Layout((batch, None))
    assert node.meta[LAYOUT] == Layout((mesh.divide(12, ("cfg",)), None))
    one.check(mesh, program)

"""Examples of contractions, convolutions, operators on images, transforms and factories."""

from __future__ import annotations

import torch
from ir_examples import Sample, aten, example, named

from xdit_ir.ir.partial_attention import merge_partials, partial_attention
from xdit_ir.ir.window_ops import overlap_add, window_energy
from xdit_ir.rules.spectral import NAMES as TRANSFORMS


@example(aten.matmul, aten.linalg_matmul)
def matmul(d, packet):
    inner, rows, columns = d.shape(3)
    batch = d.shape(d.int(0, 2))
    left = d.pick((inner,), (*d.broadcast(batch), rows, inner))
    right = d.pick((inner,), (*d.broadcast(batch), inner, columns))
    return Sample(packet.default, (d.tensor(*left), d.tensor(*right)))


@example(*named("mm", "bmm", "mv", "dot", "vdot", "outer", "ger", "linalg_vecdot", "tensordot"))
def product(d, packet):
    a, b, c, e = d.shape(4)
    shapes = {
        aten.mm: ((a, b), (b, c)),
        aten.bmm: ((e, a, b), (e, b, c)),
        aten.mv: ((a, b), (b,)),
        aten.dot: ((a,), (a,)),
        aten.vdot: ((a,), (a,)),
        aten.outer: ((a,), (b,)),
        aten.ger: ((a,), (b,)),
        aten.linalg_vecdot: ((a, b, c), d.broadcast((a, b, c))),
        aten.tensordot: ((a, b, c), (c, e, a)),
    }[packet]
    args = tuple(d.tensor(*shape) for shape in shapes)
    if packet is aten.linalg_vecdot:
        return Sample(packet.default, args, {"dim": d.dim(3) if len(shapes[1]) == 3 else -1})
    return Sample(packet.default, (*args, [0, -1], [2, 0]) if packet is aten.tensordot else args)


@example(aten.bilinear)
def bilinear(d, packet):
    batch, (left, right, out) = d.shape(d.int(1, 2)), d.shape(3)
    bias = d.tensor(out) if d.bool() else None
    return Sample(packet.default, (d.tensor(*batch, left), d.tensor(*batch, right), d.tensor(out, left, right), bias))


@example(aten._scaled_mm)
def scaled(d, packet):
    rows, inner, columns = (16 * d.int(1, 2) for _ in range(3))
    left, right = d.tensor(rows, inner).to(torch.float8_e4m3fn), d.tensor(columns, inner).to(torch.float8_e4m3fn).t()
    one = torch.ones(())
    return Sample(packet.default, (left, right, one, one), {"out_dtype": torch.float32})


@example(aten.gru, aten.lstm, aten.rnn_tanh, aten.rnn_relu)
def recurrent(d, packet):
    batch, tokens, width, gates = d.int(1, 4), d.int(1, 3), d.int(1, 3), {aten.gru: 3, aten.lstm: 4}.get(packet, 1)
    first, state = d.bool(), d.tensor(1, batch, width)
    x = d.tensor(*((batch, tokens) if first else (tokens, batch)), width)
    params = [d.tensor(gates * width, width) for _ in range(2)]
    states = [state, d.tensor(1, batch, width)] if packet is aten.lstm else state
    return Sample(packet.input, (x, states, params, False, 1, 0.0, False, False, first))


@example(aten._int_mm)
def integers(d, packet):
    rows, inner, columns = 64 * d.int(1, 2), 16 * d.int(1, 2), 16 * d.int(1, 2)
    left, right = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((rows, inner), (columns, inner)))
    return Sample(packet.default, (left, right.t()))


@example(aten._grouped_mm)
def grouped(d, packet):
    rows, inner, columns = (16 * d.int(1, 2) for _ in range(3))
    # Of so few values that sums of parts are exact.
    left, right = (d.tensor(*shape).sign().bfloat16() for shape in ((2 * rows, inner), (2, inner, columns)))
    return Sample(packet.default, (left, right, torch.tensor([rows, 2 * rows], dtype=torch.int32)))


@example(aten.inner, aten.cdist)
def rows_with_rows(d, packet):
    width = d.int(1, 4)
    if packet is aten.inner:
        shapes = [d.shape(d.int(0, 2)) for _ in range(2)]
    else:
        batch = d.shape(d.int(0, 1))
        shapes = [(*d.broadcast(batch), d.int(1, 5)) for _ in range(2)]
    return Sample(packet.default, tuple(d.tensor(*shape, width) for shape in shapes))


@example(aten.cross, aten.linalg_cross)
def cross(d, packet):
    shape = list(d.shape(d.int(1, 3)))
    dim = d.dim(len(shape))
    shape[dim] = 3
    pair = d.tensor(*shape), d.tensor(*shape)
    if packet is aten.cross:
        return Sample(packet.default, (*pair, d.pick(dim, None)))
    return Sample(packet.default, pair, {"dim": dim})


@example(*named("linalg_inv", "inverse", "linalg_det", "det"))
def matrices(d, packet):
    size = d.int(1, 3)
    return Sample(packet.default, (d.tensor(*d.shape(d.int(0, 2)), size, size),))


@example(aten.linear)
def linear(d, packet):
    inner, out = d.shape(2)
    batch = d.shape(d.int(0, 3), low=0 if d.int(0, 7) == 7 else 1)
    bias = d.pick(None, d.tensor(out))
    return Sample(packet.default, (d.tensor(*batch, inner), d.tensor(out, inner), bias))


@example(aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm)
def added(d, packet):
    a, b, c, e = d.shape(4)
    left, right, out = {
        aten.addmm: ((a, b), (b, c), (a, c)),
        aten.baddbmm: ((e, a, b), (e, b, c), (e, a, c)),
        aten.addmv: ((a, b), (b,), (a,)),
        aten.addbmm: ((e, a, b), (e, b, c), (a, c)),
    }[packet]
    own = d.tensor(*d.broadcast(out))
    return Sample(packet.default, (own, d.tensor(*left), d.tensor(*right)), {"alpha": 0.5})


EQUATIONS = [
    "ij,jk->ik",
    "bhqd,bhkd->bhqk",
    "b h q k, b h k d -> b q h d",
    "bij,jk,bk->bi",
    "ij->j",
    "ij->",
    "ij,ij",
    "ba,cb",
    "i,j->ij",
    "ii->i",
    "...ij,...jk->...ik",
    "...i,ij->...j",
    "b...d,d->b...",
    "...i,...i",
    "bn,...n->b...",
]


@example(aten.einsum)
def einsum(d, packet):
    equation = d.pick(*EQUATIONS)
    sizes = {letter: d.int(1, 5) for letter in "abcdhijkqn"}
    hidden = d.shape(d.int(0, 2))
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    shapes = []
    for term in terms:
        head, dots, tail = term.partition("...")
        middle = d.broadcast(hidden) if dots and len(terms) > 1 else hidden if dots else ()
        shapes.append((*(sizes[c] for c in head), *middle, *(sizes[c] for c in tail)))
    return Sample(packet.default, (equation, [d.tensor(*shape) for shape in shapes]))


def window(d, ndim):
    """Kernel, stride, padding, dilation per dim, and sizes on which they fit."""
    kernel = [d.int(1, 4) for _ in range(ndim)]
    blocks = d.int(0, 3) == 3
    stride = kernel if blocks else [d.int(1, 3) for _ in range(ndim)]
    padding = [0 if blocks else d.int(0, k // 2) for k in kernel]
    dilation = [1 if blocks else d.pick(1, 1, 2) for _ in range(ndim)]
    least = [(k - 1) * e + 1 for k, e in zip(kernel, dilation, strict=True)]
    sizes = [k * d.int(1, 4) if blocks else m + d.int(0, 9) for m, k in zip(least, kernel, strict=True)]
    return kernel, stride, padding, dilation, sizes


@example(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
def conv(d, packet):
    ndim = d.int(1, 2) if packet is aten.convolution else int(str(packet)[-2])
    kernel, stride, padding, dilation, sizes = window(d, ndim)
    groups = d.pick(1, 1, 2)
    channels, out = groups * d.int(1, 2), groups * d.int(1, 2)
    batch = () if d.int(0, 5) == 5 and packet is not aten.convolution else (d.int(1, 3),)
    x, weight = d.tensor(*batch, channels, *sizes), d.tensor(out, channels // groups, *kernel)
    bias = d.pick(None, d.tensor(out))
    if packet is aten.convolution:
        return Sample(packet.default, (x, weight, bias, stride, padding, dilation, False, [0] * ndim, groups))
    if d.int(0, 3) == 3:
        same = d.pick("same", "valid")
        own = [1] * ndim if same == "same" else stride
        return Sample(packet.padding, (x, weight, bias, own, same, dilation, groups))
    return Sample(packet.default, (x, weight, bias, stride, padding, dilation, groups))


def transposed_args(d, ndim, batch):
    kernel, stride, padding, dilation, sizes = window(d, ndim)
    groups = d.pick(1, 1, 2)
    x = d.tensor(*batch, 2, *(max(size, k) for size, k in zip(sizes, kernel, strict=True)))
    extra = [d.int(0, max(by, far) - 1) for by, far in zip(stride, dilation, strict=True)]
    return x, d.tensor(2, 4 // groups, *kernel), d.pick(None, d.tensor(4)), stride, padding, extra, groups, dilation


@example(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed(d, packet):
    ndim = int(str(packet)[-2])
    batch = () if d.int(0, 5) == 5 else (d.int(1, 3),)
    return Sample(packet.default if ndim == 1 else packet.input, transposed_args(d, ndim, batch))


@example(aten.convolution)
def transposed_convolution(d, packet):
    x, weight, bias, stride, padding, extra, groups, dilation = transposed_args(d, 2, (d.int(1, 3),))
    return Sample(packet.default, (x, weight, bias, stride, padding, dilation, True, extra, groups))


@example(aten.constant_pad_nd, aten.pad)
def pad(d, packet):
    shape = d.shape(d.int(1, 4), low=2)
    amounts = [d.int(0, 3) if d.bool() else d.int(-1, 1) for _ in range(2 * d.int(1, len(shape)))]
    return Sample(packet.default, (d.tensor(*shape), amounts))


@example(*named(*(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))))
def edge_pad(d, packet):
    ndim = int(str(packet)[-2])
    x = d.tensor(d.int(1, 4), d.int(1, 3), *d.shape(ndim, low=3, high=9))
    return Sample(packet.default, (x, [d.int(0, 2) for _ in range(2 * ndim)]))


@example(aten.pad)
def pad_mode(d, packet):
    x = d.tensor(d.int(1, 4), d.int(1, 3), *d.shape(2, low=3, high=9))
    video = d.bool()  # of which only rows and columns are padded
    x, none = (x.unsqueeze(2), [0, 0]) if video else (x, [])
    return Sample(
        packet.default, (x, [d.int(0, 2) for _ in range(4)] + none, d.pick("reflect", "replicate", "circular"))
    )


SMOOTH = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}
RESIZED = [f"upsample_{mode}{n}d" for n, modes in SMOOTH.items() for mode in (*modes, "nearest")]


@example(*named(*RESIZED, *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3))))
@example(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa)
def resize(d, packet):
    """By whole factors longer or shorter, by others, and at corners."""
    ndim = int(str(packet).removesuffix("_aa")[-2])
    corners = () if "nearest" in str(packet) else (d.int(0, 5) == 5,)
    if d.bool():
        x, scale = d.tensor(d.int(1, 3), d.int(1, 3), *d.shape(ndim, high=8)), d.pick(2.0, 2.0, 3.0, 1.5, 3.1, 0.7)
        return Sample(packet.vec, (x, None, *corners, [scale] * ndim))
    by, shape = [d.pick((1, 2), (2, 1), (2, 3), (3, 1), (1, 1)) for _ in range(ndim)], d.shape(ndim, high=5)
    sizes = [[n * one for n, one in zip(shape, column, strict=True)] for column in zip(*by, strict=True)]
    x = d.tensor(d.int(1, 3), d.int(1, 3), *sizes[0])
    return Sample(packet.default, (x, sizes[1] if d.int(0, 4) else [5] * ndim, *corners))


@example(*named(*(f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))))
def pool(d, packet):
    ndim = int(str(packet).partition("_pool")[2][0])
    batch = () if d.int(0, 4) == 4 else (d.int(1, 3),)
    kernel, stride, padding, dilation, sizes = window(d, ndim)
    x, up = d.tensor(*batch, d.int(1, 3), *sizes), d.int(0, 3) == 3
    if "max" in str(packet):
        return Sample(packet.default, (x, kernel, stride, padding, dilation, up))
    x = d.tensor(*x.shape[:-ndim], *(max(size, k) for size, k in zip(sizes, kernel, strict=True)))
    divisor = () if ndim == 1 or d.int(0, 3) else (d.int(1, 3),)
    return Sample(packet.default, (x, kernel, d.pick([], stride), padding, up, d.bool(), *divisor))


@example(aten.max_pool2d_with_indices, aten.max_pool3d_with_indices)
def pool_with_indices(d, packet):
    ndim = int(str(packet).partition("_pool")[2][0])
    return Sample(packet.default, (d.tensor(d.int(1, 4), d.int(1, 3), *d.shape(ndim, low=2, high=5)), [2] * ndim))


@example(*named(*(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))))
@example(aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d)
def adaptive_pool(d, packet):
    """To parts of the size, which blocks of equal size make, and to others."""
    ndim = int(str(packet).partition("_pool")[2][0])
    out, by = d.shape(ndim, high=6), [d.int(1, 3) for _ in range(ndim)]
    x = d.tensor(d.int(1, 3), d.int(1, 3), *(n * f for n, f in zip(out, by, strict=True)))
    return Sample(packet.default, (x, out if d.int(0, 3) else [2] * ndim))


@example(*named("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im"))
def shuffle(d, packet):
    if packet is aten.im2col:
        return Sample(packet.default, (d.tensor(d.int(1, 4), 2, 4, 5), [2, 2], [1, 1], [0, 0], [1, 1]))
    if packet is aten.col2im:
        return Sample(packet.default, (d.tensor(d.int(1, 4), 8, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]))
    batch = d.shape(d.int(1, 2) if packet is not aten.channel_shuffle else 1)
    return Sample(packet.default, (d.tensor(*batch, 4, 4, 2), 2))


@example(overlap_add)
def overlaps(d, packet):
    """Sums of windows, of which a part is kept; some leave gaps."""
    kernel, stride, dilation = ([d.int(1, 3) for _ in range(2)] for _ in range(3))
    counts = d.shape(2, high=6)
    steps = zip(counts, kernel, stride, dilation, strict=True)
    sizes = [(n - 1) * by + (k - 1) * apart + 1 for n, k, by, apart in steps]
    kept = [(start := d.int(0, min(size - 1, 2)), d.int(1, size - start)) for size in sizes]
    x = d.tensor(d.int(1, 3), d.int(1, 2) * kernel[0] * kernel[1], *counts)
    return Sample(packet, (x, kernel, stride, dilation, kept))


@example(window_energy)
def energy(d, packet):
    return Sample(packet, (d.tensor(4).abs() + 1, d.int(2, 5), 2, (2, d.int(1, 4))))


@example(aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d)
def sample_grid(d, packet):
    ndim = 3 if packet is aten.grid_sampler_3d else 2
    batch = d.int(1, 3)
    x, grid = d.tensor(batch, d.int(1, 3), *d.shape(ndim, low=2, high=4)), d.tensor(batch, *d.shape(ndim), ndim)
    return Sample(packet.default, (x, grid, 0, 0, False))


@example(*named(*TRANSFORMS))
def transform(d, packet):
    name = str(packet).removeprefix("aten.")
    x = d.tensor(*d.shape(3, low=2, high=5))
    x = x if any(part in name for part in ("rfft", "ihfft", "r2c")) and "irfft" not in name else d.complex(*x.shape)
    dims = d.some(range(-3, 0), least=2)[:2]
    if name.startswith("_fft"):
        dims = [dim + 3 for dim in dims]
        half = 2 * (x.shape[dims[-1]] - 1)
        return Sample(packet.default, (x, dims, 0, half if name == "_fft_c2r" else True))
    if name.endswith("shift"):
        return Sample(packet.default, (x, d.pick(None, dims)))
    if name.endswith("2"):
        return Sample(packet.default, (x, None, dims))
    if name.endswith("n"):
        return d.pick(Sample(packet.default, (x, None, d.pick(None, dims))), Sample(packet.default, (x, [3, 4])))
    return Sample(packet.default, (x, d.pick(None, 4), d.dim(3)))


@example(*named("arange", "linspace", "logspace", "full", "zeros", "ones", "empty", "empty_strided", "eye"))
@example(*named("scalar_tensor", "tril_indices", "triu_indices"))
def factory(d, packet):
    args = {
        aten.arange: (d.int(0, 6),),
        aten.linspace: (0, 1, 5),
        aten.logspace: (0, 1, 5),
        aten.full: ([2, 3], 0.5),
        aten.empty_strided: ([2, 3], [3, 1]),
        aten.eye: (3,),
        aten.scalar_tensor: (0.5,),
        aten.tril_indices: (3, 4),
        aten.triu_indices: (3, 4),
    }.get(packet, ([2, 3],))
    target = packet.memory_format if packet is aten.empty else packet.default
    return Sample(target, args, contents="empty" not in str(packet))


@example(*named("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"))
def like(d, packet):
    extra = {aten.new_full: (0.5,), aten.new_empty_strided: ([3, 1],)}.get(packet, ())
    return Sample(packet.default, (d.tensor(*d.sized()), [2, 3], *extra), contents="empty" not in str(packet))


@example(partial_attention)
def in_parts(d, packet):
    heads, queries, keys, width = d.shape(4)
    group, first = d.pick(1, 2), d.int(0, keys)
    parts = d.pick(None, [((0, first),), ((first, keys - first),)], [((first, keys - first), (0, first))])
    q, k, v = d.tensor(2, group * heads, queries, width), *(d.tensor(2, heads, keys, width) for _ in range(2))
    shape = (*d.broadcast((2, group * heads)), d.pick(1, queries), d.pick(1, keys))
    mask = d.pick(None, d.tensor(*shape), d.mask(*shape))
    return Sample(packet, (q, k, v, mask), {"enable_gqa": group > 1, "parts": parts})


@example(merge_partials)
def merged(d, packet):
    parts, queries = d.int(1, 3), d.int(1, 4)
    return Sample(packet, (d.tensor(*d.shape(2), parts * queries, d.int(2, 4)), parts))

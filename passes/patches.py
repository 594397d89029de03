"""Windows that do not overlap, as views and products: what is divided into patches can then be divided anyhow. Of those
that do, rows and columns are told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments
from xdit_ir.ir.program import SPEC
from xdit_ir.ir.window_ops import overlap_add
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten


def patches_of_convolution(graph: fx.Graph, node: fx.Node) -> bool:
    """A convolution whose windows do not overlap, as a matrix product of patches: tokens can then be divided anyhow."""
    if getattr(node.target, "overloadpacket", None) not in (aten.conv1d, aten.conv2d, aten.conv3d):
        return False
    given = bound_arguments(node)
    x, weight = given["input"], given["weight"]
    batch, *_ = shape = x.meta[SPEC].shape
    out_channels, in_channels, *kernel = weight.meta[SPEC].shape
    count = len(kernel)
    plain = given["groups"] == 1 and list(given["stride"]) in (kernel, kernel[:1]) and max(kernel) > 1
    if isinstance(given["padding"], str) or any(given["padding"]) or set(given["dilation"]) != {1} or not plain:
        return False
    if len(shape) != count + 2 or any(size % k for size, k in zip(shape[2:], kernel, strict=True)):
        return False
    grid = [size // k for size, k in zip(shape[2:], kernel, strict=True)]
    if list(given["stride"]) != kernel and len(set(kernel)) > 1:
        return False
    features, tokens = in_channels * math.prod(kernel), math.prod(grid)
    emitter = Emitter(graph, node)
    split = [batch, in_channels, *(n for pair in zip(grid, kernel, strict=True) for n in pair)]
    y = emitter.reshape(x, split)
    y = emitter.permute(y, [0, *range(2, 2 + 2 * count, 2), 1, *range(3, 3 + 2 * count, 2)])
    y = emitter.reshape(y, [batch, tokens, features])
    matrix = emitter.reshape(weight, [out_channels, features])
    y = emitter.emit(aten.linear.default, y, matrix, given["bias"])
    y = emitter.reshape(y, [batch, *grid, out_channels])
    node.replace_all_uses_with(emitter.permute(y, [0, count + 1, *range(1, count + 1)]))
    return True


def patches_of_transposed(graph: fx.Graph, node: fx.Node) -> bool:
    """A transposed convolution whose windows do not overlap, as a matrix product that makes each token's patch."""
    transposed = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
    if getattr(node.target, "overloadpacket", None) not in transposed:
        return False
    given = bound_arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    batch, *_ = shape = x.meta[SPEC].shape
    in_channels, out_channels, *kernel = weight.meta[SPEC].shape
    count = len(kernel)
    stride = list(given["stride"]) * (count if len(given["stride"]) == 1 else 1)
    if len(shape) != count + 2 or given["groups"] != 1 or stride != kernel or set(given["dilation"]) != {1}:
        return False
    if any(given["padding"]) or any(given["output_padding"]):
        return False
    grid, features = shape[2:], out_channels * math.prod(kernel)
    emitter = Emitter(graph, node)
    y = emitter.permute(x, [0, *range(2, 2 + count), 1])
    matrix = emitter.permute(emitter.reshape(weight, [in_channels, features]), [1, 0])
    y = emitter.emit(aten.linear.default, y, matrix)
    y = emitter.reshape(y, [batch, *grid, out_channels, *kernel])
    pairs = (dim for d in range(count) for dim in (1 + d, 2 + count + d))
    y = emitter.reshape(emitter.permute(y, [0, count + 1, *pairs]), node.meta[SPEC].shape)
    if bias is not None:
        column = emitter.reshape(bias, [out_channels, *[1] * count])
        y = emitter.emit(aten.add.Tensor, y, column)
    node.replace_all_uses_with(y)
    return True


def patches_of_unfold(graph: fx.Graph, node: fx.Node) -> bool:
    """`F.unfold` with windows side by side: views and a permute."""
    found = _side_by_side(node, aten.im2col.default)
    if found is None:
        return False
    rows, columns, kernel = found
    x = node.args[0]
    assert isinstance(x, fx.Node)
    *before, _, _ = x.meta[SPEC].shape
    emitter, at = Emitter(graph, node), len(before)
    y = emitter.reshape(x, [*before, rows, kernel[0], columns, kernel[1]])
    y = emitter.permute(y, [*range(at), at + 1, at + 3, at, at + 2])
    node.replace_all_uses_with(emitter.reshape(y, node.meta[SPEC].shape))
    return True


def patches_of_fold(graph: fx.Graph, node: fx.Node) -> bool:
    """`F.fold` with windows side by side: what `patches_of_unfold` undoes."""
    found = _side_by_side(node, aten.col2im.default)
    if found is None:
        return False
    rows, columns, kernel = found
    x = node.args[0]
    assert isinstance(x, fx.Node)
    *before, _, _ = node.meta[SPEC].shape
    emitter, at = Emitter(graph, node), len(before)
    y = emitter.reshape(x, [*before, *kernel, rows, columns])
    y = emitter.permute(y, [*range(at), at + 2, at, at + 3, at + 1])
    node.replace_all_uses_with(emitter.reshape(y, node.meta[SPEC].shape))
    return True


def windows_of_unfold(graph: fx.Graph, node: fx.Node) -> bool:
    """`F.unfold` with windows that overlap, or reach over the edge: pads, windows of rows and of columns as views."""
    if node.target is not aten.im2col.default:
        return False
    given, (kernel, stride, padding, dilation) = _windows(node)
    emitter, y = Emitter(graph, node), given["self"]
    *before, _, _ = y.meta[SPEC].shape
    if any(padding):
        y = emitter.emit(aten.constant_pad_nd.default, y, [padding[1], padding[1], padding[0], padding[0]], 0)
    at = len(before)
    for dim, size, by, apart in zip((at, at + 1), kernel, stride, dilation, strict=True):
        y = emitter.emit(aten.unfold.default, y, dim, (size - 1) * apart + 1, by)
        if apart > 1:
            y = emitter.emit(aten.slice.Tensor, y, len(y.meta[SPEC].shape) - 1, 0, None, apart)
    y = emitter.permute(y, [*range(at), at + 2, at + 3, at, at + 1])
    node.replace_all_uses_with(emitter.reshape(y, node.meta[SPEC].shape))
    return True


def windows_of_fold(graph: fx.Graph, node: fx.Node) -> bool:
    """`F.fold` with windows that overlap: the sum of windows in rows and columns."""
    if node.target is not aten.col2im.default:
        return False
    given, (kernel, stride, padding, dilation) = _windows(node)
    sizes, emitter = list(node.meta[SPEC].shape[-2:]), Emitter(graph, node)
    steps = zip(sizes, kernel, stride, padding, dilation, strict=True)
    counts = [(size + 2 * pad - (k - 1) * apart - 1) // by + 1 for size, k, by, pad, apart in steps]
    *before, _ = given["self"].meta[SPEC].shape
    y = emitter.reshape(given["self"], [*before, *counts])
    kept = [list(pair) for pair in zip(padding, sizes, strict=True)]
    node.replace_all_uses_with(emitter.emit(overlap_add, y, kernel, stride, dilation, kept))
    return True


def _side_by_side(node: fx.Node, target: object) -> tuple[int, int, list[int]] | None:
    """Rows and columns of windows, and their size, where they fill an image without overlap."""
    if node.target is not target:
        return None
    given, (kernel, stride, padding, dilation) = _windows(node)
    image = given["self"] if target is aten.im2col.default else node
    height, width = image.meta[SPEC].shape[-2:]
    if kernel != stride or padding != [0, 0] or dilation != [1, 1] or height % kernel[0] or width % kernel[1]:
        return None
    return height // kernel[0], width // kernel[1], kernel


def _windows(node: fx.Node) -> tuple[Mapping[str, Any], tuple[list[int], ...]]:
    """The arguments of an `unfold` or `fold`, and of rows and columns: kernel, stride, padding, dilation."""
    given = bound_arguments(node)
    return given, tuple(_two(given[key]) for key in ("kernel_size", "stride", "padding", "dilation"))


def _two(sizes: list[int]) -> list[int]:
    """The same for both dims where one is given."""
    return list(sizes) * (1 if len(sizes) > 1 else 2)

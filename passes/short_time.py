"""Short-time Fourier transforms as windows: each rank transforms its own frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from xdit_ir.ir.graphs import bound_arguments
from xdit_ir.ir.program import SPEC
from xdit_ir.ir.window_ops import overlap_add, window_energy
from xdit_ir.passes.emit import Emitter

aten = torch.ops.aten


def frames_of_sound(graph: fx.Graph, node: fx.Node) -> bool:
    """`torch.stft`: windows as a view, each times the window function, and transformed."""
    if node.target is not aten.stft.default:
        return False
    given = bound_arguments(node)
    x, size = given["self"], given["n_fft"]
    spec, real = x.meta[SPEC], not x.meta[SPEC].dtype.is_complex
    half = real if given["onesided"] is None else given["onesided"]
    if given["window"] is None or not node.meta[SPEC].dtype.is_complex or given["align_to_window"]:
        return False
    emitter = Emitter(graph, node)
    y = emitter.emit(aten.unfold.default, x, len(spec.shape) - 1, size, given["hop_length"] or size // 4)
    y = emitter.emit(aten.mul.Tensor, y, _window(emitter, given))
    transform = aten.fft_rfft.default if half else aten.fft_fft.default
    y = emitter.emit(transform, y, size, -1, "ortho" if given["normalized"] else None)
    last = len(y.meta[SPEC].shape) - 1
    node.replace_all_uses_with(emitter.permute(y, [*range(last - 1), last, last - 1]))
    return True


def sound_of_frames(graph: fx.Graph, node: fx.Node) -> bool:
    """`torch.istft`, centred: frames transformed back, times the window function, summed, and divided by what windows
    make of ones."""
    if node.target is not aten.istft.default:
        return False
    given = bound_arguments(node)
    x, size, shape = given["self"], given["n_fft"], node.meta[SPEC].shape
    *before, bins, frames = x.meta[SPEC].shape
    hop, half = given["hop_length"] or size // 4, bins == size // 2 + 1
    kept = (size // 2, shape[-1])
    behind = sum(kept) > (frames - 1) * hop + size  # zeros behind the last frame
    if given["window"] is None or not given["center"] or given["return_complex"] or behind:
        return False
    emitter, norm = Emitter(graph, node), "ortho" if given["normalized"] else None
    if half:
        y = emitter.emit(aten.fft_irfft.default, x, size, -2, norm)
    else:
        y = emitter.emit(aten.real.default, emitter.emit(aten.fft_ifft.default, x, size, -2, norm))
    window = _window(emitter, given)
    y = emitter.emit(aten.mul.Tensor, y, emitter.reshape(window, [size, 1]))
    y = emitter.reshape(y, [before[0] if before else 1, size, 1, frames])
    y = emitter.emit(overlap_add, y, [1, size], [1, hop], [1, 1], [[0, 1], list(kept)])
    energy = emitter.emit(window_energy, window, frames, hop, list(kept))
    node.replace_all_uses_with(emitter.reshape(emitter.emit(aten.div.Tensor, y, energy), shape))
    return True


def _window(emitter: Emitter, given: dict[str, Any]) -> fx.Node:
    """The window function, in the middle of a frame where it is shorter."""
    window, size = given["window"], given["n_fft"]
    lacking = size - window.meta[SPEC].shape[0]
    if not lacking:
        return window  # type: ignore[no-any-return]
    return emitter.emit(aten.constant_pad_nd.default, window, [lacking // 2, lacking - lacking // 2])

"""What the kernels of a machine can do, measured: shapes in, the figures of `xdit_ir.planning.hardware.Kernels` out."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xdit_ir.kernels.backends import Problem, choose

Figures = dict[str, float]
Work = Callable[[], object]
# Rows, columns and contracted size of products as transformers have them; and of a CPU's.
PRODUCTS = ((4608, 3072, 3072), (4608, 12288, 3072), (4608, 3072, 12288), (1152, 3072, 3072), (1152, 9216, 3072))
FURTHER = ((576, 3072, 3072), (16384, 5120, 5120), (8192, 8192, 8192))
SMALL = ((256, 256, 256), (64, 512, 512), (512, 512, 128))
FILLS, DEPTHS = (0, 1e5, 2e5, 4e5, 6.5e5, 9e5, 1.3e6, 2e6), (0, 30, 60, 110, 160, 240, 360)
CHAIN = 8  # operators in one recording


@dataclass(frozen=True)
class Bench:
    """Times calls on a device, and says what they took. `least`: seconds of a burst."""

    device: torch.device
    say: Callable[[str], None]
    least: float = 0.3

    @property
    def gpu(self) -> bool:
        """Whether it is one; a CPU gets small shapes."""
        return self.device.type == "cuda"

    @property
    def half(self) -> torch.dtype:
        """What models are computed in there."""
        return torch.bfloat16 if self.gpu else torch.float32

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values that make a GPU draw the power that it draws at work."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.half)

    def seconds(self, work: Work) -> float:
        """Of a call: the median of three bursts after one that warms up, and finds their length."""
        work()
        once = max(self._burst(work, 2) / 2, 1e-7)
        count = max(2, min(math.ceil(self.least / once), 100_000))
        return statistics.median(self._burst(work, count) for _ in range(3)) / count

    def _burst(self, work: Work, count: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done all."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def recorded(self, work: Work) -> Work:
        """As a CUDA graph, where there are such: without the host's time to start kernels."""
        if not self.gpu:
            return work
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            work()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def products(bench: Bench) -> Figures:
    """Speed, and what small results and short sums lose."""
    taken = []
    for m, n, k in (*PRODUCTS, *FURTHER) if bench.gpu else SMALL:
        x, weight, bias = bench.random(m, k), bench.random(n, k), bench.random(n)
        taken.append((m, n, k, _product(bench, x, weight, bias)))
    return fitted(taken) if bench.gpu else fitted(taken, fills=(0,), depths=(0,))


def fitted(
    taken: Sequence[tuple[int, int, int, float]], fills: Sequence[float] = FILLS, depths: Sequence[float] = DEPTHS
) -> Figures:
    """The speed, `fill` and `depth` with which the time of products is nearest to what was measured, by their ratio."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for fill, depth in itertools.product(fills, depths):
        speeds = [2 * m * n * k * (1 + fill / (m * n)) * (1 + depth / k) / seconds for m, n, k, seconds in taken]
        logs = [math.log(speed) for speed in speeds]
        spread = statistics.pvariance(logs)
        if spread < best[0]:
            best = (spread, math.exp(statistics.fmean(logs)), fill, depth)
    return {"products": best[1], "fill": best[2], "depth": best[3]}


def single(bench: Bench) -> Figures:
    """Products in single precision."""
    size = 4096 if bench.gpu else 384
    x, weight, bias = (bench.random(*shape, dtype=torch.float32) for shape in ((size, size), (size, size), (size,)))
    return {"single": 2 * size**3 / _product(bench, x, weight, bias)}


def _product(bench: Bench, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    seconds = bench.seconds(lambda: F.linear(x, weight, bias))
    (m, k), n = x.shape, weight.shape[0]
    bench.say(f"product {m} x {n} x {k} {x.dtype}: {seconds * 1e6:.1f} us, {2e-12 * m * n * k / seconds:.4g} TFLOP/s")
    return seconds


def attention(bench: Bench) -> Figures:
    """By the kernel that PyTorch takes: speed, and what narrow heads lose."""
    tokens = (4608, 8192) if bench.gpu else (256,)
    slow = [statistics.fmean(_attention(bench, size, width, "sdpa") for size in tokens) for width in (64, 128)]
    times = min(max(slow[0] / slow[1], 1.0), 1.9)
    width = (times - 1) / (1 / 64 - times / 128)
    return {"attention": (1 + width / 128) / slow[1], "width": width}


def flash(bench: Bench) -> Figures:
    """By FlashAttention, where it is installed: what it reaches with heads of 128."""
    tokens = 8192
    shape = (1, 24, tokens, 128)
    problem = Problem(shape, shape, shape, bench.half, torch.cuda.get_device_capability(bench.device), recorded=True)
    if choose("auto", problem) is None:
        raise LookupError("FlashAttention 3 or 4 is not installed")
    return {"flash": 1 / _attention(bench, tokens, 128, "auto")}


def _attention(bench: Bench, tokens: int, width: int, kernel: str) -> float:
    """Seconds for each FLOP."""
    heads = 24 if bench.gpu else 2
    q, k, v = (bench.random(1, heads, tokens, width) for _ in range(3))
    capability = torch.cuda.get_device_capability(bench.device) if bench.gpu else None
    problem = Problem(tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, capability, recorded=True)
    backend = choose(kernel, problem)

    def work() -> object:
        return F.scaled_dot_product_attention(q, k, v) if backend is None else backend.run(q, k, v, None, False)

    seconds = bench.seconds(work)
    name = "sdpa" if backend is None else backend.name
    bench.say(f"attention {name} of {heads} heads of {width}, {tokens} tokens: {seconds * 1e6:.1f} us")
    return seconds / problem.flops


def memory(bench: Bench) -> Figures:
    """A product of one row, which is bound by reading its weights."""
    n, k = (18432, 6144) if bench.gpu else (2048, 1024)
    x, weight = bench.random(1, k), bench.random(n, k)
    seconds = bench.seconds(bench.recorded(lambda: F.linear(x, weight)))
    return {"memory": weight.nbytes / seconds}


def fused(bench: Bench) -> Figures:
    """Norms with modulation, and rotary positions, compiled where there is a GPU: speed, and time between kernels."""
    taken = []
    for rows in (1024, 4096, 16384) if bench.gpu else (64, 256, 1024):
        heads, width = (24, 128) if bench.gpu else (4, 64)
        x, scale = bench.random(1, rows, heads * width), bench.random(1, 1, heads * width)
        table = bench.random(rows, width, dtype=torch.float32)
        for work in (_modulated, _rotated):
            compiled = torch.compile(work, dynamic=False) if bench.gpu else work
            chained = bench.recorded(_chain(compiled, x, scale, table, heads))
            seconds = bench.seconds(chained) / CHAIN
            taken.append((2.0 * x.nbytes, seconds))
            bench.say(f"{work.__name__[1:]} {x.nbytes / 2**20:.1f} MiB: {seconds * 1e6:.1f} us")
    start, speed = line(taken)
    return {"fused": speed, "gap": start}


def _chain(
    work: Callable[..., torch.Tensor], x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, heads: int
) -> Work:
    def chain() -> object:
        y = x
        for _ in range(CHAIN):
            y = work(y, scale, table, heads)
        return y

    return chain


def _modulated(x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, heads: int) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + scale


def _rotated(x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, heads: int) -> torch.Tensor:
    width = x.shape[-1] // heads
    y = F.rms_norm(x.view(*x.shape[:-1], heads, width).transpose(1, 2), (width,))
    even, odd = y.float()[..., ::2], y.float()[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (y.float() * table + turned * table).to(x.dtype).transpose(1, 2).flatten(2)


def line(taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Seconds before the first byte, and bytes a second, with which times are nearest, by their ratio."""
    weighted = [(1 / seconds, size / seconds) for size, seconds in taken]
    (aa, ab, bb) = (sum(a * a for a, _ in weighted), sum(a * b for a, b in weighted), sum(b * b for _, b in weighted))
    (at, bt), whole = (sum(a for a, _ in weighted), sum(b for _, b in weighted)), aa * bb - ab * ab
    start, each = ((at * bb - bt * ab) / whole, (bt * aa - at * ab) / whole) if whole else (0.0, 0.0)
    if each <= 0 or start < 0:  # nothing but one of both can be told apart
        start, each = (0.0, bt / bb) if start < 0 else (statistics.fmean(seconds for _, seconds in taken), 1e-15)
    return start, 1 / each


def host(bench: Bench) -> Figures:
    """What the host takes to start a small product of a module."""
    module = torch.nn.Linear(64, 64).to(bench.device, bench.half)
    x = bench.random(1, 64)
    return {"host": bench.seconds(lambda: module(x))}

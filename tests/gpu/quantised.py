"""Quantised weights at full size: `torchrun --nproc-per-node 2 tests/gpu/quantised.py [flux.1-dev [WAY ...]]`.

Every rank fills the published configuration with the same random bf16 weights and quantises copies of it by torchao:
int8 weights, and float8 weights with float8 activations, scaled by rows and by whole tensors (`int8-weights`,
`float8-by-rows`, `float8-by-tensors`; all, or those that are named). Each copy runs alone, eagerly, and ported with
Ulysses over all ranks, in mode "auto"; so does the bf16 model. Printed are relative differences of outputs: of the port
and its model alone (`port`), of the quantised model alone when its input changes in the third digit, as bf16 does
(`own`), and to bf16 (`quantised`); then milliseconds of all ports, timed in turns. Ends with status 1 if a port differs
by more than its model's own error, and with 2 if float8 was tried and none of it is faster than bf16.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import parity
import staged
import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.common import KernelPreference

import xdit_ir as xir

TORCH = KernelPreference.TORCH  # no kernels of other packages
ROUNDS, CALLS, ROUNDING = 4, 5, 2e-2
WAYS: dict[str, Callable[[], Any]] = {
    "int8-weights": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
    "float8-by-rows": lambda: float8(PerRow()),
    "float8-by-tensors": lambda: float8(PerTensor()),
}


def float8(granularity: Any) -> Any:
    """Weights and activations with scales of this granularity; the compiler's tuner, which would add minutes, off."""
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=granularity, kernel_preference=TORCH, set_inductor_config=False
    )


def first(output: Any) -> torch.Tensor:
    """The first output tensor, in fp32."""
    found: torch.Tensor = pytree.tree_leaves(output)[0]
    return found.float().clone()


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference."""
    return ((one - other).norm() / other.norm()).item()


def compared(name: str, model: nn.Module, example: dict[str, Any], plain: torch.Tensor) -> tuple[Any, bool]:
    """A port, and whether it gives what its model gives; prints a line."""
    with torch.inference_mode():
        want = first(model(**example))
        own = error(first(model(**parity.rounded_otherwise(example))), want)
        port: Any = xir.port(model, ulysses=dist.get_world_size())
        start = time.perf_counter()
        for _ in range(3):
            got = first(port(**example))
        seconds = time.perf_counter() - start
    found, most = error(got, want), max(ROUNDING, 1.5 * own)
    memory = max(one.weights for one in port.report().memory) / 2**30
    print(
        f"rank {dist.get_rank()} {name}: port {found:.2e}, own {own:.2e}, quantised {error(want, plain):.2e}; "
        f"{memory:.2f} GiB of weights; three calls in {seconds:.0f} s",
        flush=True,
    )
    if dist.get_rank() == 0:
        print(str(port.report()).splitlines()[0], port.report().execution, sep="\n")
        print([str(item.op) for item in port.report().fallbacks] or "no fallbacks", flush=True)
    return port, found <= most


def milliseconds(port: Any, example: dict[str, Any]) -> list[float]:
    """Of some calls, behind one that is not counted."""
    times = []
    with torch.inference_mode():
        for call in range(CALLS + 1):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            port(**example)
            torch.cuda.synchronize()
            times += [(time.perf_counter() - start) * 1e3] if call else []
    return times


def main() -> int:
    """Compare and print, rank by rank."""
    device = staged.start()
    model, example = parity.load(sys.argv[1] if len(sys.argv) > 1 else "flux.1-dev", device)
    model.requires_grad_(False)
    with torch.inference_mode():
        plain = first(model(**example))
    ports, right = {}, []
    wanted = {name: config for name, config in WAYS.items() if name in sys.argv[2:] or not sys.argv[2:]}
    for name, config in ({"bf16": None} | wanted).items():
        made = copy.deepcopy(model)
        if config is not None:
            quantize_(made, config())
        ports[name], good = compared(name, made, example, plain)
        right.append(good)
    times: dict[str, list[float]] = {name: [] for name in ports}
    for _ in range(ROUNDS):
        for name, port in ports.items():
            times[name] += milliseconds(port, example)
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        ratio = median[name] / median["bf16"]
        print(
            f"rank {dist.get_rank()} {name}: median {median[name]:.1f} ms, min {min(found):.1f}, max {max(found):.1f}; "
            f"{ratio:.3f} of bf16",
            flush=True,
        )
    for port in ports.values():
        port.reset()
    dist.destroy_process_group()
    if not all(right):
        return 1
    float8 = [median[name] for name in ports if "float8" in name]
    return 2 if float8 and min(float8) >= median["bf16"] else 0


if __name__ == "__main__":
    sys.exit(main())

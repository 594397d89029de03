"""A recording that fails leaves all as it was: `torchrun --nproc-per-node 2 tests/gpu/failed_recording.py`.

A model whose second layer calls an operator that synchronises the GPU, which PyTorch does not say in advance, on one
rank only. Recording it fails there; then the port, the original model and the generators work as before. Prints a line
for each check; status 1 if one does not hold.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings

import staged
import torch
import torch.distributed as dist
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import relative_error

FAILING = [False]
LIMIT = 100  # seconds


@torch.library.custom_op("xdit_ir_tests::halting", mutates_args=())
def halting(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x`; waits for the GPU where `FAILING`."""
    if FAILING[0]:
        torch.cuda.synchronize()
    return x.clone()


@halting.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Halting(nn.Module):
    """A DiT whose output passes through the operator."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """As the inner model's."""
        return halting(self.inner(**inputs))


class Checks(dict[str, bool]):
    """What was looked at, and whether it holds; each prints a line at once."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def __setitem__(self, name: str, holds: bool) -> None:
        print(f"rank {self._rank}: {'holds' if holds else 'FAILS'}: {name}", flush=True)
        super().__setitem__(name, holds)


def move(model: nn.Module) -> None:
    """Let all weights lie elsewhere."""
    for weight in model.parameters():
        weight.data = weight.data.clone()


def main() -> int:
    """Run the checks on this rank."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    rank = int(os.environ["LOCAL_RANK"])
    device = staged.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, example = models.load("plain-mmdit:tiny", seed=0)
    model = Halting(model).to(device).eval()
    inputs = {name: value.to(device) for name, value in example.items()}
    checks = Checks(rank)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        want = model(**inputs)
        torch.manual_seed(5)
        noise = torch.randn(3, device=device).tolist()
        torch.manual_seed(5)
        FAILING[0] = rank == 1
        port = xir.port(model, ulysses=2, mode="auto")
        for call in ("first", "second", "third"):  # the second one records
            checks[f"the {call} call is right"] = relative_error([port(**inputs)], [want]) < 2e-4
        checks["the generator is as it was"] = torch.randn(3, device=device).tolist() == noise
        checks["the original works"] = relative_error([model(**inputs)], [want]) < 1e-6
        FAILING[0] = False
        other = xir.port(model, ulysses=2, mode="graph")
        checks["another port records"] = relative_error([other(**inputs)], [want]) < 2e-4
        for time in range(4):
            move(model)
            checks[f"it records again for weights elsewhere, {time}"] = relative_error([other(**inputs)], [want]) < 2e-4
    failed = "cannot be recorded" in port.report().execution
    checks["the report and a warning say so, where it failed"] = (
        failed == (rank == 1) == any("cannot be recorded" in str(one.message) for one in said)
    )
    port.reset()
    other.reset()
    dist.barrier()
    dist.destroy_process_group()
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""One rank of `bench`: run every contender on equal weights and inputs, check its output, time it.

Started by `xdit-ir bench` under torchrun; rank 0 writes the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir import models
from xdit_ir.ir.difference import tensors_of
from xdit_ir.tools.contenders import Contender, Forward, release


def main() -> None:
    """Run the contenders given on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--contenders", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--burst", type=int, default=4)
    parser.add_argument("--profile", default="")
    parser.add_argument("--command", default="")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch._dynamo.config.cache_size_limit = 64
    model, example = models.load(args.model, device=str(device), dtype=torch.bfloat16)
    exact = _in_float32(model, example)
    results: list[dict[str, Any]] = []
    _write(args, results)
    for text in args.contenders.split(","):
        contender = Contender.parse(text)
        results.append(_of_all_ranks(_result(contender, model, example, exact, args)))
        _write(args, results)
        if "failure" in results[-1]:  # nobody knows what it has left behind: a new process goes on
            break
        release(model)
        if any(parameter.is_meta for parameter in model.parameters()):  # held in parts by that contender
            model, example = models.load(args.model, device=str(device), dtype=torch.bfloat16)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # communicators that CUDA graphs recorded would wait for each other when they are destroyed


def _of_all_ranks(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the failure of any rank."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, result.get("failure"))
    found = next((failure for failure in failures if failure is not None), None)
    return result if found is None else result | {"failure": found}


def _write(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if dist.get_rank() == 0:
        print(json.dumps(results[-1:]), flush=True)
        args.out.write_text(json.dumps(_document(args, results), indent=1))


def _document(args: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": args.model,
        "gpu": torch.cuda.get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "samples": args.samples,
        "burst": args.burst,
        "command": args.command,
        "results": results,
    }


@torch.no_grad()
def _in_float32(model: nn.Module, example: dict[str, Any]) -> torch.Tensor:
    """The output computed in float32; the weights come back as they were, since bf16 to float32 is exact.

    Repeated blocks are wide only while they run, so that a model that fits a GPU in bf16 has a reference there.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(module) for one in lists for block in one for module in block.modules()}
    blocks = [block for one in lists if id(one) not in inner for block in one]
    wide = _Wide(model)
    inside = {id(tensor) for block in blocks for tensor in wide.of(block)}
    wide.widen(tensor for tensor in wide.of(model) if id(tensor) not in inside)
    hooks = [block.register_forward_pre_hook(lambda one, _: wide.widen(wide.of(one))) for block in blocks]
    hooks += [block.register_forward_hook(lambda one, *_: wide.restore(wide.of(one))) for block in blocks]
    given = pytree.tree_map_only(torch.Tensor, lambda x: x.float() if x.is_floating_point() else x, example)
    exact = _first(model(**given)).float()
    for hook in hooks:
        hook.remove()
    wide.restore(wide.of(model))
    torch.cuda.empty_cache()
    return exact


class _Wide:
    """Changes weights to float32, and back to what they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._dtypes = {id(tensor): tensor.dtype for tensor in self.of(model)}

    @staticmethod
    def of(module: nn.Module) -> list[torch.Tensor]:
        """All weights and buffers."""
        return [*module.parameters(), *module.buffers()]

    def widen(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()

    def restore(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.to(self._dtypes.get(id(tensor), tensor.dtype))  # a new one stays as it is


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = tensors_of(output)[0]
    return tensor


def _result(
    contender: Contender, model: nn.Module, example: dict[str, Any], exact: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Time, memory and error of one contender; or why it did not run."""
    result: dict[str, Any] = {"contender": str(contender)}
    try:
        start = time.perf_counter()
        forward = contender.prepare(model, example)
        with torch.no_grad():
            output = _first(forward(**example)).float()
            torch.cuda.synchronize()
            result["first_call_s"] = time.perf_counter() - start
            result["weights"] = _weights(forward)
            result["error"] = ((output - exact).norm() / exact.norm()).item()
            torch.cuda.reset_peak_memory_stats()
            calls = contender.sizes.get("cfg", 1)  # where they do not divide a batch, they divide calls
            times = _times(forward, example, args.samples, args.burst, calls)
        result |= {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["communication_ms"] = _communication(forward, example, calls)
        if args.profile == str(contender) and dist.get_rank() == 0:
            _profile(forward, example, args.out.with_suffix(".trace.txt"))
        elif args.profile == str(contender):
            _run(forward, example, 3)
    except Exception as failure:
        result["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        traceback.print_exc()
    return result


def _weights(forward: Forward) -> float:
    """The most weights that a rank needs, as a part of the model's."""
    program = getattr(forward, "program", None)
    if program is None:
        return 1.0
    return float(program.report().weight_share)


@torch.no_grad()
def _run(forward: Forward, example: dict[str, Any], count: int, calls: int = 1) -> None:
    """One image in `count` steps of so many calls, as guidance makes them: Euler's method on the latents, which are
    read at the end."""
    given = dict(example)
    for _ in range(count):
        outputs = [_first(forward(**given)) for _ in range(calls)]
        output = outputs[0] if calls == 1 else torch.stack(outputs).mean(0)
        name = _latents(example, output)
        if name is not None:
            given[name] = given[name] - output.chunk(output.shape[1] // given[name].shape[1], 1)[0] / count
    if count:
        torch.isfinite(given[name] if name is not None else output).all().item()
    torch.cuda.synchronize()


def _latents(example: dict[str, Any], output: torch.Tensor) -> str | None:
    """The input that an output moves: of its shape, but for more channels (a predicted variance)."""

    def fits(value: Any) -> bool:
        if not isinstance(value, torch.Tensor) or value.dim() != output.dim() or value.dtype != output.dtype:
            return False
        alike = value.shape[:1] + value.shape[2:] == output.shape[:1] + output.shape[2:]
        return alike and output.shape[1] % value.shape[1] == 0

    return next((name for name, value in example.items() if fits(value)), None)


def _times(forward: Forward, example: dict[str, Any], samples: int, burst: int, calls: int) -> list[float]:
    """Milliseconds per forward, each sample over a burst of steps of so many forwards as in a denoising loop."""
    _run(forward, example, 2, calls)
    times = []
    for _ in range(samples):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        _run(forward, example, burst, calls)
        times.append((time.perf_counter() - start) * 1e3 / (burst * calls))
    return times


def _communication(forward: Forward, example: dict[str, Any], calls: int) -> float:
    """Milliseconds of one forward, of so many in a step, in which kernels on this rank do nothing but move data to
    others or wait for it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        _run(forward, example, 1, calls)
    words = ("nccl", "symmetric_memory")
    found = (event for event in recorded.key_averages() if any(word in event.key.lower() for word in words))
    return float(sum(event.self_device_time_total for event in found)) / (1e3 * calls)


def _profile(forward: Forward, example: dict[str, Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        _run(forward, example, 3)
    table = recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(table)
    recorded.export_chrome_trace(str(path.with_suffix(".json")))


if __name__ == "__main__":
    main()

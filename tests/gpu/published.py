"""Models of published size in bf16 over real GPUs: `python tests/gpu/published.py --ranks 2 flux.1-dev wan2.1-t2v-14b`.

Each model, with equal random weights on every rank, runs alone on one GPU with its repeated blocks compiled, and then
ported in the default mode; the outputs are compared, and both are timed. Without names: those of
`xdit_ir.models.published`, each under u2 and, where its example has a batch that can be divided, c2. `MODEL@auto`
leaves the degrees to the planner. With `--output FILE --resume` what an earlier run has written there is left out. Goes
on behind a failure in a new process and ends by itself; status 1 if anything failed, differed or was slower than one
GPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lanes

LIMIT = 4e-2  # bf16: two ways to add up differ by up to 1.6e-2 from float32 each
OWN = 1.5  # times what the model makes of inputs rounded otherwise, where that is more: experts are chosen by rounding
CALLS = 6


def tried(name: str, degrees: str, mode: str) -> lanes.Result:
    """What becomes of a model under these degrees."""
    import torch

    import xdit_ir as xir
    from xdit_ir import models
    from xdit_ir.ir.difference import relative_error, tensors_of
    from xdit_ir.tools.contenders import Contender, release

    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    model, example = models.load(name, seed=0, device=str(device), dtype=torch.bfloat16)
    with torch.inference_mode():
        for way in ("alone:compiled", "alone:eager"):  # eagerly what cannot be compiled, such as experts by the host
            try:
                alone = Contender.parse(way).prepare(model, example)
                want = [x.clone() for x in tensors_of(alone(**example))]
                before = milliseconds(alone, example, CALLS)
                break
            except torch.OutOfMemoryError as error:
                return {"status": "refused", "reason": f"the model alone: {error}"[:200]}
            except torch._dynamo.exc.TorchDynamoException:
                release(model)
        release(model)
        port = xir.port(model, mode=mode, **lanes.degrees_of(degrees))
        try:
            for _ in range(2):
                port(**example)
            got = tensors_of(port(**example))
            error = relative_error(got, want)
            limit = LIMIT if error <= LIMIT else max(LIMIT, OWN * own_error(model, example))
            after = milliseconds(port, example, CALLS)
        except xir.ParallelizeError as refused:
            return {"status": "refused", "reason": str(refused)[:300]}
    gain, execution = statistics.median(before) / statistics.median(after), port.report().execution
    port.reset()
    del model, port, alone
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "status": "different" if error > limit else "slower" if gain < 1 else "equal",
        "error": float(error),
        "seconds": time.monotonic() - start,
        "times": f"{way} {range_of(before)}, ported {range_of(after)}, {gain:.2f}x",
        "runs": execution,
        "alone_ms": before,
        "ported_ms": after,
    }


def own_error(model: Any, example: Mapping[str, Any]) -> float:
    """What becomes of the model's outputs where an input is rounded otherwise."""
    from parity import rounded_otherwise

    from xdit_ir.ir.difference import relative_error, tensors_of

    changed = tensors_of(model(**rounded_otherwise(example)))
    return float(relative_error(changed, tensors_of(model(**example))))


def milliseconds(run: Callable[..., Any], example: Mapping[str, Any], calls: int) -> list[float]:
    """Of each call; all ranks begin together."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(calls):
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(**example)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def range_of(times: list[float]) -> str:
    """Median, and from the least to the most."""
    return f"{statistics.median(times):.1f} ms ({min(times):.1f} to {max(times):.1f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        lanes.work(tried, *json.loads(sys.argv[2]))
    from xdit_ir.models.published import PUBLISHED

    given = lanes.arguments(__doc__, degrees="u2", lanes=1).parse_args()
    sys.exit(
        lanes.share_out(given, given.names or [f"{name}@{one}" for one, names in PUBLISHED.items() for name in names])
    )

"""Every model of the zoo over real GPUs: `python tests/gpu/zoo.py --ranks 2 --output zoo.json`.

Each tiny model, in float32, runs alone and then ported under each of the degrees, in the mode that is asked for; its
second and third call (replays, where it is recorded) are compared, to 2e-4 or 1.2 of what torch.compile alone changes.
`--degrees u2+sharded` divides weights too. A degree that is illegal for the model is listed as refused. Models are
shared out to `--lanes` groups of processes at the same GPUs; a group that fails or takes too long is ended, and a new
one goes on behind it. Ends by itself, with status 1 if anything failed. With more `--ranks` than GPUs, ranks share
them: slow, and collectives go through the host (`staged.py`), so that graphs end there; programs, compiled code and
copy engines are those of as many GPUs.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lanes

LIMIT = 2e-4


def moved(value: Any, device: Any) -> Any:
    """A value with all tensors in it on a device; objects, such as caches, are changed in place."""
    if hasattr(value, "device") and hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    for name, item in getattr(value, "__dict__", {}).items():
        setattr(value, name, moved(item, device))
    return value


def tried(name: str, degrees: str, mode: str) -> dict[str, Any]:
    """What becomes of a model under these degrees."""
    import torch

    import xdit_ir as xir
    from xdit_ir import models
    from xdit_ir.ir.difference import relative_error, tensors_of

    start, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    model, example = models.load(f"{name}:tiny", seed=0)
    model = model.to(device).eval()
    example = moved(example, device)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            want = [x.clone() for x in tensors_of(model(*args, **kwargs))]
        except Exception as error:
            return {"status": "refused", "reason": f"the model alone: {type(error).__name__}: {error}"[:300]}
        port = xir.port(model, **{"mode": mode, **lanes.degrees_of(degrees), **lanes.options_of(degrees)})
        try:
            port(*args, **kwargs)
            got = [[x.clone() for x in tensors_of(port(*args, **kwargs))] for _ in range(2)]
        except xir.ParallelizeError as error:
            return {"status": "refused", "reason": str(error)[:300]}
        except Exception as error:
            at = " < ".join(
                f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[:-9:-1]
            )
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400] + f" at {at}"}
    error, limit = max(relative_error(one, want) for one in got), LIMIT
    if error > LIMIT and mode != "eager":  # the compiler's own rounding, of the model alone
        with torch.no_grad():
            limit = max(LIMIT, 1.2 * relative_error(tensors_of(torch.compile(model)(*args, **kwargs)), want))
    runs = [str(one.message) for one in warned if "mode 'auto'" in str(one.message)]
    execution = port.report().execution
    port.reset()
    torch.cuda.synchronize()
    found = {"status": "equal" if error <= limit else "different", "error": float(error)}
    return found | {"seconds": time.monotonic() - start, "runs": execution, "warnings": runs}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        lanes.work(tried, *json.loads(sys.argv[2]))
    from xdit_ir import models

    given = lanes.arguments(__doc__, degrees="u2,r2,c2,p2", lanes=4).parse_args()
    sys.exit(lanes.share_out(given, given.names or sorted(models.names())))

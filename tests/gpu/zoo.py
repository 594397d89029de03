"""Every model of the zoo over real GPUs: `python tests/gpu/zoo.py --ranks 2 --output zoo.json`.

Each tiny model, in float32, runs alone and then ported under each of the degrees, in the mode that is asked for; its
second call (a replay, where it is recorded) is compared, to 2e-4 or 1.2 of what torch.compile alone changes. A degree
that is illegal for the model is listed as refused. Models are shared out to `--lanes` groups of processes at the same
GPUs; a group that fails or takes too long is ended, and a new one goes on behind it. Ends by itself, with status 1 if
anything failed. With more `--ranks` than GPUs, ranks share them: slow, and collectives go through the host
(`staged.py`), so that graphs end there; programs, compiled code and copy engines are those of as many GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEGREES = {
    "u": "ulysses",
    "r": "ring",
    "c": "cfg",
    "p": "pipefusion",
}
LIMIT = 2e-4
PORTS = 20000


def degrees_of(text: str) -> dict[str, int]:
    """`u2` or `c2u2` as keyword arguments of `port`."""
    parts = text.replace("u", " u").replace("r", " r").replace("c", " c").replace("p", " p").split()
    return {DEGREES[part[0]]: int(part[1:]) for part in parts}


@dataclass(frozen=True)
class Lane:
    """A group of processes, one per GPU, that works through `tasks`; `number` tells lanes apart."""

    number: int
    options: argparse.Namespace
    tasks: Sequence[tuple[str, str]]

    def run(self) -> list[dict[str, Any]]:
        """What came of every task."""
        results: list[dict[str, Any]] = []
        ports = itertools.count(PORTS + 100 * self.number)
        while len(results) < len(self.tasks):
            results += self._group(self.tasks[len(results) :], next(ports))
        return results

    def _group(self, tasks: Sequence[tuple[str, str]], port: int) -> list[dict[str, Any]]:
        """Start processes for tasks, and watch them; at least the first task has a result."""
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "results"
            said.touch()
            ranks = [self._start(rank, tasks, said, port, Path(folder)) for rank in range(self.options.ranks)]
            results, since = list[dict[str, Any]](), time.monotonic()
            while any(one.poll() is None for one in ranks):
                time.sleep(0.2)
                if more := _read(said, after=results):
                    results, since = results + more, time.monotonic()
                if time.monotonic() - since > self.options.timeout or any(one.poll() for one in ranks):
                    time.sleep(1)
                    break
            codes = [one.poll() for one in ranks]
            for one in ranks:
                one.kill()
                one.wait()
            results += _read(said, after=results)
            if len(results) < len(tasks) and all(map(is_good, results)):
                results.append(self._failed(tasks[len(results)], codes, Path(folder)))
                print(line_of(results[-1]), flush=True)
            return results

    def _start(
        self, rank: int, tasks: Sequence[tuple[str, str]], said: Path, port: int, folder: Path
    ) -> subprocess.Popen[bytes]:
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.options.ranks),
            "OMP_NUM_THREADS": "2",
        }
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--worker", json.dumps([self.options.mode, str(said), list(tasks)])]
        with (folder / f"errors_{rank}").open("wb") as errors:
            return subprocess.Popen(command, env=os.environ | env, stdout=errors, stderr=errors)

    def _failed(self, task: tuple[str, str], codes: Sequence[int | None], folder: Path) -> dict[str, Any]:
        lines = [(folder / f"errors_{rank}").read_text(errors="replace").splitlines() for rank in range(len(codes))]
        if self.options.logs:
            for rank, each in enumerate(lines):
                Path(self.options.logs, f"{task[0]}_{task[1]}_{rank}.log").write_text("\n".join(each[-200:]))
        errors = [line for each in lines for line in each if "Error:" in line]
        reason = errors[0] if errors else f"no end in {self.options.timeout} s, or killed ({codes})"
        return {"model": task[0], "degrees": task[1], "status": "failed", "reason": reason[:400]}


def _read(said: Path, after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What has been written since, which is printed."""
    more = [json.loads(line) for line in said.read_text().splitlines()[len(after) :]]
    for one in more:
        print(line_of(one), flush=True)
    return more


def is_good(one: dict[str, Any]) -> bool:
    """Whether a result is as it should be."""
    return one["status"] in ("equal", "refused")


def line_of(one: dict[str, Any]) -> str:
    """A result as people read it."""
    rest = f"{one['error']:.1e} in {one['seconds']:.0f} s" if "error" in one else one["reason"]
    notes = f"; {one['runs']}" if one.get("runs") else ""
    return f"{one['status']:9s} {one['model']:28s} {one['degrees']:5s} {rest}{notes}"


def work(mode: str, said: str, tasks: Sequence[tuple[str, str]]) -> None:
    """One rank of a lane."""
    import staged
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    staged.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for model, degrees in tasks:
        result = {"model": model, "degrees": degrees, **tried(model, degrees, mode)}
        if rank == 0:
            with open(said, "a") as file:
                file.write(json.dumps(result) + "\n")
        if not is_good(result):
            os._exit(0 if rank == 0 else 3)
    dist.barrier()
    os._exit(0)


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
        port = xir.port(model, mode=mode, **degrees_of(degrees))
        try:
            port(*args, **kwargs)
            got = tensors_of(port(*args, **kwargs))
        except xir.ParallelizeError as error:
            return {"status": "refused", "reason": str(error)[:300]}
        except Exception as error:
            at = " < ".join(
                f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[:-9:-1]
            )
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400] + f" at {at}"}
    error, limit = relative_error(got, want), LIMIT
    if error > LIMIT and mode != "eager":  # the compiler's own rounding, of the model alone
        with torch.no_grad():
            limit = max(LIMIT, 1.2 * relative_error(tensors_of(torch.compile(model)(*args, **kwargs)), want))
    runs = [str(one.message) for one in warned if "mode 'auto'" in str(one.message)]
    execution = port.report().execution
    port.reset()
    torch.cuda.synchronize()
    found = {"status": "equal" if error <= limit else "different", "error": float(error)}
    return found | {"seconds": time.monotonic() - start, "runs": execution, "warnings": runs}


def main() -> int:
    """Share out the tasks, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models of the zoo, or MODEL@DEGREES; default: all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--degrees", default="u2,r2,c2,p2")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=150, help="seconds without a result after which a group ends")
    parser.add_argument("--logs", help="a folder for what groups that failed have written")
    parser.add_argument("--output", help="where the results are written as JSON")
    options = parser.parse_args()
    from xdit_ir import models

    names = options.names or sorted(models.names())
    tasks = [tuple(f"{name}@{degrees}".split("@")[:2]) for degrees in options.degrees.split(",") for name in names]
    tasks = list(dict.fromkeys(tasks))
    lanes = [Lane(number, options, tasks[number :: options.lanes]) for number in range(options.lanes)]
    with ThreadPoolExecutor(len(lanes)) as pool:
        results = sorted((one for found in pool.map(Lane.run, lanes) for one in found), key=lambda one: one["model"])
    if options.output:
        Path(options.output).write_text(json.dumps(results, indent=1) + "\n")
    bad = [one for one in results if not is_good(one)]
    counts = {status: sum(one["status"] == status for one in results) for status in ("equal", "refused")}
    print(f"{counts['equal']} equal, {counts['refused']} refused, {len(bad)} failed or different", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
    sys.exit(main())

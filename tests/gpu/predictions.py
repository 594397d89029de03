"""Plans against measurements on two GPUs: `python tests/gpu/predictions.py --output benchmarks/plans/h200.json`.

Every published model under several ways to use two GPUs, by `xdit-ir bench` in processes of its own, which are ended
where nothing new is measured for `--timeout` seconds, and started again with what is left. What was measured goes to
one file as it comes, which `tests/planning/test_predictions.py` reads; what is there is not measured again. Then prints
each figure beside what a plan works out, whether the planned way is within 3 % of the fastest, and whether the order is
right. `--calibrated` measures the machine first, and works out for it. `--limit` seconds in all. Status 1 if a figure
is off by more than 15 %, an order or a choice is wrong, or too little was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WAYS = ("alone:compiled", *(f"{way}:graph@sdpa" for way in ("u2", "r2", "p2m2", "u2+sharded")))
BATCHED = ("c2:graph@sdpa",)
# By how quick they are; those whose example has two samples are divided along these too.
MODELS = {
    "pixart-sigma": (*WAYS, *BATCHED),
    "lumina-2": WAYS,
    "z-image": WAYS,
    "flux.1-dev": WAYS,
    "sd3.5-large": (*WAYS, *BATCHED),
    "wan2.1-t2v-1.3b": WAYS,
    "qwen-image": WAYS,
    "cogvideox-5b": WAYS,
}
ENOUGH = (6, 20)  # models, figures


def main() -> int:
    """Measure what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--output", type=Path, required=True, help="the file")
    parser.add_argument("--timeout", type=float, default=150, help="seconds in which something new must be measured")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which nothing is begun")
    parser.add_argument("--calibrated", action="store_true", help="measure the machine too")
    args = parser.parse_args()
    begun = time.monotonic()
    machine = _calibrated(args.output) if args.calibrated else None
    documents = json.loads(args.output.read_text())["documents"] if args.output.exists() else []
    for model in args.models or MODELS:
        if time.monotonic() - begun > args.limit:
            print(f"{model}: no time left; run it again", flush=True)
            continue
        known = [one for one in documents if one["model"] == model]
        done = {result["contender"] for one in known for result in one["results"]}
        for document in _measured(model, [way for way in MODELS.get(model, WAYS) if way not in done], args.timeout):
            documents.append(document)
            args.output.write_text(json.dumps({"documents": documents}, indent=1) + "\n")
    return _compared(args.output, machine)


def _calibrated(beside: Path) -> str:
    path = str(beside.with_suffix(".machine.toml"))
    if not Path(path).exists():
        subprocess.run([sys.executable, "-m", "xdit_ir.tools.cli", "calibrate", "--output", path], check=True)
    return path


def _measured(model: str, ways: Sequence[str], timeout: float) -> Iterator[dict[str, Any]]:
    """What `xdit-ir bench` writes of a model; a way that does not end is left out, and noted as a failure."""
    left = list(ways)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bench.json"
            command = ["bench", model, "--gpus", "2", "--contenders", ",".join(left), "--samples", "3", "--burst", "4"]
            ended = _watched([sys.executable, "-m", "xdit_ir.tools.cli", *command, "--out", str(out)], out, timeout)
            document = json.loads(out.read_text()) if out.exists() else {"model": model, "gpu": "", "results": []}
        done = len(document["results"])
        if done < len(left):
            document["results"].append({"contender": left[done], "failure": f"no end in {timeout} s ({ended})"})
        for result in document["results"]:
            said = f"{result['median_ms']:.1f} ms" if "median_ms" in result else result["failure"][:200]
            print(f"{model} {result['contender']}: {said}", flush=True)
        left = left[len(document["results"]) :]
        yield document


def _watched(command: list[str], out: Path, timeout: float) -> int | None:
    """Run it until it ends, or writes nothing for too long; the exit status."""
    with subprocess.Popen(command, stdout=sys.stderr, start_new_session=True) as started:
        since, size = time.monotonic(), 0
        while started.poll() is None and time.monotonic() - since < timeout:
            time.sleep(1)
            if out.exists() and out.stat().st_size != size:
                since, size = time.monotonic(), out.stat().st_size
        status = started.poll()
        if status is None:
            os.killpg(started.pid, signal.SIGKILL)  # the session that was started here
    return status


def _compared(path: Path, machine: str | None) -> int:
    from xdit_ir.planning.hardware import load
    from xdit_ir.tools import predictions

    compared = predictions.compare(predictions.read(path), None if machine is None else load(machine))
    for line in predictions.lines(compared):
        print(line, flush=True)
    near = all(abs(one.ratio - 1) <= 0.15 for one in compared)
    within = [one for one in compared if abs(one.ratio - 1) <= 0.1]
    models = {one.measured.model for one in within}
    best = max(predictions.choices(compared).values(), default=0.0) <= predictions.CHOICE
    enough = len(models) >= ENOUGH[0] and len(within) >= ENOUGH[1]
    return 0 if near and best and enough and not predictions.disorder(compared) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Tasks shared out to groups of processes on real GPUs, which go on behind a failure and end by themselves.

A script gives `main` its tasks and `work` what becomes of one; the script itself is started again for every rank.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEGREES = {
    "u": "ulysses",
    "r": "ring",
    "c": "cfg",
    "p": "pipefusion",
    "t": "tensor",
}
# What can stand behind a `+` of a way, as keyword arguments of `port`.
OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "compiled": lambda _: {"mode": "compiled"},
    "recorded": lambda _: {"mode": "graph"},
    "sharded": lambda _: {"shard_weights": True},
    "stream": lambda amount: {"stream_weights": amount or True},
    "release": lambda _: {"release": True},
}
Result = dict[str, Any]
Task = tuple[str, str]


def degrees_of(text: str) -> dict[str, int]:
    """`u2` or `c2u2` as keyword arguments of `port`; `auto` as none, so that they are planned. Options that a script
    writes behind a `+` are left out."""
    return {DEGREES[letter]: int(size) for letter, size in re.findall(r"([a-z])(\d+)", text.partition("+")[0])}


def options_of(text: str, others: Collection[str] = ()) -> dict[str, Any]:
    """What stands behind each `+`, as keyword arguments of `port`; a script reads the `others` itself."""
    words = (word.partition("=") for word in text.split("+")[1:])
    found = [OPTIONS[word](value) for word, _, value in words if word not in others]
    return {name: value for one in found for name, value in one.items()}


class Record:
    """All results, in a file of JSON after each of them, if there is one; to `resume`, with those of an earlier run."""

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self._path, self._turn = path, threading.Lock()
        earlier: list[Result] = json.loads(path.read_text()) if resume and path is not None and path.exists() else []
        self.results = [one for one in earlier if one["status"] != "failed"]
        self.done: set[Task] = {(one["model"], one["degrees"]) for one in self.results}

    def add(self, results: Sequence[Result]) -> None:
        """Print some, and keep them."""
        with self._turn:
            for one in results:
                print(line_of(one), flush=True)
            self.results = sorted((*self.results, *results), key=lambda one: (one["model"], one["degrees"]))
            if self._path is not None and results:
                self._path.write_text(json.dumps(self.results, indent=1) + "\n")


@dataclass(frozen=True)
class Lane:
    """A group of processes that works through `tasks`, or with `options.fresh` one for each of them. They share `gpus`:
    `options.ranks`, or as many as the degrees of a task divide by."""

    gpus: Sequence[int]
    options: argparse.Namespace
    tasks: Sequence[Task]
    record: Record

    def run(self) -> list[Result]:
        """What came of every task."""
        results: list[Result] = []
        while len(results) < len(self.tasks):
            left = self.tasks[len(results) :]
            results += self._group(left[:1] if self.options.fresh else left, _free_port())
        return results

    def _group(self, tasks: Sequence[Task], port: int) -> list[Result]:
        """Start processes for tasks, and watch them; at least the first task has a result."""
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "results"
            said.touch()
            world = self.options.ranks or math.prod(degrees_of(tasks[0][1]).values())
            here = range(1 if self.options.loopback else world)
            ranks = [self._start(rank, world, tasks, said, port, Path(folder)) for rank in here]
            results, since = list[Result](), time.monotonic()
            while any(one.poll() is None for one in ranks):
                time.sleep(0.2)
                if more := self._read(said, after=results):
                    results, since = results + more, time.monotonic()
                if time.monotonic() - since > self.options.timeout or any(one.poll() for one in ranks):
                    for one in ranks:
                        one.send_signal(signal.SIGUSR1)  # that they say where they stand; the dead do not mind
                    time.sleep(1)
                    break
            codes = [one.poll() for one in ranks]
            for one in ranks:
                one.kill()
                one.wait()
            results += self._read(said, after=results)
            if len(results) < len(tasks) and all(map(is_good, results)):
                results.append(self._failed(tasks[len(results)], codes, Path(folder)))
                self.record.add(results[-1:])
            return results

    def _read(self, said: Path, after: Sequence[Result]) -> list[Result]:
        """What has been written since."""
        more: list[Result] = [json.loads(line) for line in said.read_text().splitlines()[len(after) :]]
        self.record.add(more)
        return more

    def _start(
        self, rank: int, world: int, tasks: Sequence[Task], said: Path, port: int, folder: Path
    ) -> subprocess.Popen[bytes]:
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "2",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus)),
        }
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        alone = world if self.options.loopback else 0
        given = [self.options.mode, str(said), list(tasks), alone]
        command = [sys.executable, sys.argv[0], "--worker", json.dumps(given)]
        with (folder / f"errors_{rank}").open("wb") as errors:
            return subprocess.Popen(command, env=os.environ | env, stdout=errors, stderr=errors)

    def _failed(self, task: Task, codes: Sequence[int | None], folder: Path) -> Result:
        lines = [(folder / f"errors_{rank}").read_text(errors="replace").splitlines() for rank in range(len(codes))]
        if self.options.logs:
            for rank, each in enumerate(lines):
                Path(self.options.logs, f"{task[0]}_{task[1]}_{rank}.log").write_text("\n".join(each[-200:]))
        errors = [line for each in lines for line in each if "Error:" in line and "frame #" not in line]
        reason = errors[0] if errors else f"no end in {self.options.timeout} s, or killed ({codes})"
        return {"model": task[0], "degrees": task[1], "status": "failed", "reason": reason[:400]}


def _free_port() -> int:
    """One that systems do not give to whoever connects, before the group that gets it listens there."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def is_good(one: Result) -> bool:
    """Whether a result is as it should be."""
    return one["status"] in ("equal", "refused", "timed")


def line_of(one: Result) -> str:
    """A result as people read it."""
    rest = f"{one['error']:.1e} in {one['seconds']:.0f} s" if "error" in one else one["reason"]
    notes = "".join(f"; {one[key]}" for key in ("times", "runs") if one.get(key))
    return f"{one['status']:9s} {one['model']:28s} {one['degrees']:5s} {rest}{notes}"


def work(tried: Callable[[str, str, str], Result], mode: str, said: str, tasks: Sequence[Task], alone: int) -> None:
    """One rank of a lane: `tried(model, degrees, mode)` of every task; says where it stands when it gets SIGUSR1.

    `alone`: it is the first of so many, without the others (`loopback.py`).
    """
    import loopback
    import staged
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # of others that run, a dump may end the process
    _ = loopback.start(alone) if alone else staged.start()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for model, degrees in tasks:
        result = {"model": model, "degrees": degrees, **tried(model, degrees, mode)}
        if alone and result["status"] in ("different", "slower"):
            result["status"] = "timed"
        if rank == 0:
            with open(said, "a") as file:
                file.write(json.dumps(result) + "\n")
        if not is_good(result):
            os._exit(0 if rank == 0 else 3)
    dist.barrier()
    os._exit(0)


def arguments(description: str | None, *, degrees: str, lanes: int, fresh: bool = False) -> argparse.ArgumentParser:
    """What every such script can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="what to try, or NAME@DEGREES; default: all")
    parser.set_defaults(fresh=fresh)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each group; 0: by the degrees of a task")
    parser.add_argument("--degrees", default=degrees)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--lanes", type=int, default=lanes)
    parser.add_argument("--timeout", type=float, default=150, help="seconds without a result after which a group ends")
    parser.add_argument("--logs", help="a folder for what groups that failed have written")
    parser.add_argument("--output", type=Path, help="where results are written as JSON, after each of them")
    parser.add_argument(
        "--loopback", action="store_true", help="only the first rank, on one GPU: its time, not equality"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what --output has already, unless it failed")
    return parser


def share_out(options: argparse.Namespace, names: Sequence[str]) -> int:
    """Try every name under every set of degrees, and write what came of them; the exit status.

    Lanes take turns at the GPUs of this machine that are visible, as many at a time as a lane has ranks.
    """
    import torch

    pairs = (f"{name}@{degrees}".split("@") for degrees in options.degrees.split(",") for name in names)
    tasks: list[Task] = list(dict.fromkeys((name, degrees) for name, degrees, *_ in pairs))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [*map(int, seen.split(","))] if seen else [*range(torch.cuda.device_count())]
    each = options.ranks or max(len(gpus), 1)
    places = max(1, len(gpus) // each)
    first = [number % places * each for number in range(options.lanes)]
    record = Record(options.output, resume=options.resume)
    tasks = [task for task in tasks if task not in record.done]
    lanes = [
        Lane(gpus[start : start + each], options, tasks[number :: options.lanes], record)
        for number, start in enumerate(first)
    ]
    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(Lane.run, lanes))
    results = record.results
    bad = [one for one in results if not is_good(one)]
    counts = {status: sum(one["status"] == status for one in results) for status in ("equal", "refused")}
    print(f"{counts['equal']} equal, {counts['refused']} refused, {len(bad)} failed or different", flush=True)
    return 1 if bad else 0

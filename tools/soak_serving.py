"""`python -m xdit_ir.tools.soak_serving`: a server under load, whose ranks are killed now and then.

`xdit-ir serve` runs as anybody would start it. Clients send requests of many shapes, some of which they cancel, while
ranks are killed. Every answer is compared with what a pipeline in one process makes; only what ran at a kill may be
lost. Then what the server's processes hold is compared with what they held before, and at the end nothing is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_ir.models import digits
from xdit_ir.tools.census import Census, forked, orphans
from xdit_ir.tools.served import LIMIT, Alone, Body, ask, until_ready

SEEDS = 2  # of every shape
GONE = 20.0  # seconds in which the last process ends after the server
RECOVERED = 20.0  # seconds in which a right answer comes after a kill


def shapes() -> list[Body]:
    """Requests of twelve shapes for the digits model: one to six images, with guidance and without."""
    counts = [list(range(count)) for count in range(1, 7)]
    return [
        {"arguments": {"class_labels": labels}, "guidance": guidance, "steps": 4}
        for labels in counts
        for guidance in (1.0, 2.0)
    ]


@dataclass
class Soak:
    """One run against a server that is started for it."""

    folder: str
    bodies: Sequence[Body]
    count: int
    kills: int
    options: Sequence[str]
    chance: random.Random
    port: int = 0
    found: list[str] = field(default_factory=list)
    answered: int = 0
    cancelled: int = 0
    lost: int = 0
    rights: list[float] = field(default_factory=list)  # when right answers came
    recoveries: list[float] = field(default_factory=list)

    def run(self) -> list[str]:
        """What went wrong."""
        alone = Alone(self.folder)
        before = orphans()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
            process = self._start(folder, log)
            try:
                until_ready(process, self.port)
                self._serve(process, alone)
                self._stop(process)
            finally:
                process.kill()
                process.wait()
            left = set(os.listdir(folder)) - ({"ray"} if self._by_ray else set())  # which keeps its logs there
            self.found += [f"{path} is left" for path in left]
            log.seek(0)
            said = log.read()
        self.found += [line for line in said.splitlines() if "leaked" in line]
        self.found += [f"{name} is left in shared memory" for name in orphans() - before]
        return [*self.found, said[-3000:]] if self.found else []

    def _start(self, folder: str, log: Any) -> subprocess.Popen[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "xdit_ir.tools.cli", "serve", self.folder, "--port", str(self.port)]
        return subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "fp32", *self.options],
            env={**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            text=True,
        )

    def _serve(self, process: subprocess.Popen[str], alone: Alone) -> None:
        seeded = [body | {"seed": seed} for body in self.bodies for seed in range(SEEDS)]
        for body in seeded:
            alone.made(json.dumps(body))
        first = self._held(process, alone)
        due = [self.count * (place + 1) // (self.kills + 1) for place in range(self.kills)]
        killer = threading.Thread(target=self._kill, args=(process, due))
        killer.start()
        with ThreadPoolExecutor(8) as pool:
            for place in range(self.count):
                one = self._cancelled if place % 10 == 9 else self._asked
                pool.submit(self._counted, one, self.chance.choice(seeded), alone)
        killer.join()
        if self.lost > self.kills:
            self.found.append(f"{self.lost} requests were lost by {self.kills} kills")
        self.found += [f"recovered after {took:.1f} s" for took in self.recoveries if took > RECOVERED]
        last = self._held(process, alone)
        print(f"held before: {first}\nheld after:  {last}", flush=True)
        self.found += last.more_than(first)

    def _held(self, process: subprocess.Popen[str], alone: Alone) -> Census:
        """What the server's processes hold when they have made every shape, and nobody asks."""
        for body in self.bodies:
            self._asked(body | {"seed": 0}, alone)
        time.sleep(1)
        # Ray starts and ends processes of its own as it likes.
        return Census.among([process.pid, *forked(process.pid)]) if self._by_ray else Census.of(process.pid)

    @property
    def _by_ray(self) -> bool:
        return "--ray" in self.options

    def _counted(self, one: Any, body: Body, alone: Alone) -> None:
        try:
            one(body, alone)
        except Exception as error:
            self.found.append(f"{body}: {type(error).__name__}: {error}")
        self.answered += 1

    def _asked(self, body: Body, alone: Alone) -> None:
        status, content = ask(self.port, "/generate", body)
        if status == 500 and "was lost" in content["error"]["message"]:
            self.lost += 1
        elif status != 200:
            self.found.append(f"{body}: {status}, {content}")
        elif wrong := alone.wrong(body, content):
            self.found.append(f"{body}: {wrong}")
        else:
            self.rights.append(time.monotonic())

    def _cancelled(self, body: Body, alone: Alone) -> None:
        number = ask(self.port, "/requests", body)[1]["id"]
        time.sleep(self.chance.random())
        ask(self.port, f"/requests/{number}", method="DELETE")
        while (answer := ask(self.port, f"/requests/{number}"))[1].get("state") in ("queued", "running"):
            time.sleep(0.1)
        status, content = answer
        self.cancelled += status == 499
        if status == 200 and (wrong := alone.wrong(body, content)):  # it was done before
            self.found.append(f"{body}, cancelled: {wrong}")
        if status not in (200, 499) and "was lost" not in str(content):
            self.found.append(f"{body}, cancelled: {status}, {content}")

    def _kill(self, process: subprocess.Popen[str], due: Sequence[int]) -> None:
        for count in due:
            while self.answered < count:
                time.sleep(0.02)
            os.kill(self.chance.choice(forked(process.pid)), signal.SIGKILL)
            began = time.monotonic()
            time.sleep(0.5)  # an answer may be on its way
            while max(self.rights) < began + 0.5 and time.monotonic() < began + LIMIT:
                time.sleep(0.02)
            self.recoveries.append(time.monotonic() - began)

    def _stop(self, process: subprocess.Popen[str]) -> None:
        """As Ctrl-C does."""
        pids = Census.of(process.pid).pids
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            self.found.append("the server does not end")
        deadline = time.monotonic() + GONE
        while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() > deadline:
                self.found.append(f"processes are left: {left}")
                return
            time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m xdit_ir.tools.soak_serving", description=__doc__, epilog="What follows -- is for `serve`."
    )
    parser.add_argument("folder", nargs="?", default=str(digits.PIPELINE), help="a pipeline; default: the digits model")
    parser.add_argument("--body", action="append", type=json.loads, help="JSON of /generate: a shape; may be repeated")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    args, options = parser.parse_args(given[:end]), given[end + 1 :] or ["--ulysses", "2"]
    bodies = args.body or shapes()
    soak = Soak(args.folder, bodies, args.requests, args.kills, options, random.Random(args.seed))
    began = time.monotonic()
    wrong = soak.run()
    took = ", ".join(f"{seconds:.1f}" for seconds in soak.recoveries)
    print(
        f"{soak.count} requests of {len(bodies)} shapes in {time.monotonic() - began:.0f} s: {len(soak.rights)} right, "
        f"{soak.cancelled} cancelled, {soak.lost} lost by {soak.kills} kills; seconds to the next right answer: {took}"
    )
    print("\n".join(["WRONG", *wrong]) if wrong else "nothing wrong, nothing left")
    return min(1, len(wrong))


if __name__ == "__main__":
    sys.exit(main())

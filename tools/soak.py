"""`python -m xdit_ir.tools.soak --minutes 10`: requests on real processes, into which failures are injected at random.

Every episode starts gloo processes that serve requests like a server: errors of a request are caught, and the next one
begins. One rank raises, drops a request, disagrees with the others, stops or is killed. No rank may ever end a request
with a wrong result, or not at all; and unless a process is gone, all of them are right again afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

WORKER = "xdit_ir.tools.soak_worker"
DEGREES = {
    2: ({"ulysses": 2}, {"ring": 2}, {"cfg": 2}, {"pipefusion": 2, "patches": 2}, {"pipefusion": 2, "patches": 3}),
    3: ({"ulysses": 3}, {"ring": 3}, {"pipefusion": 3, "patches": 3}),
}
RECOVERED = ("raise inside", "drop", "latents", "slightly", "nan", "time", "noise", "weights")
FINAL = ("kill inside", "kill between", "stop inside", "stop between")
STEPS, TIMEOUT, LIMIT = 5, 10, 150  # steps of a request, and seconds: of the option `timeout`, and of an episode
CLEAN = 2  # requests without a failure after each that has one


@dataclass
class Episode:
    """What happens: `faults` by request, each a kind, a rank and a step."""

    ranks: int
    degrees: dict[str, int]
    how: str
    faults: dict[int, tuple[str, int, int]]
    answers: list[list[str]] = field(default_factory=list)

    @staticmethod
    def drawn(chance: random.Random, ranks: int, count: int) -> Episode:
        """At random."""
        kinds = [*chance.choices(RECOVERED, k=count - 1), chance.choice(FINAL)]
        at = {
            place * (CLEAN + 1): (kind, chance.randrange(ranks), chance.randrange(STEPS - 2))
            for place, kind in enumerate(kinds)
        }
        return Episode(ranks, chance.choice(DEGREES[ranks]), chance.choice(["port", "emit"]), at)

    def run(self) -> list[str]:
        """What went wrong."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryFile("w+") as log:
            processes = [self._start(rank, store.port, log) for rank in range(self.ranks)]
            wrong = self._watch(processes)
            self.answers = [_answers(process) for process in processes]
            wrong += self._judge()
            if wrong:
                log.seek(0)
                wrong.append(log.read()[-2000:])
        return wrong

    def _start(self, rank: int, port: int, log: Any) -> subprocess.Popen[str]:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1"}
        own |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}
        plan = {"degrees": self.degrees, "how": self.how, "faults": self.faults, "steps": STEPS}
        plan |= {"timeout": TIMEOUT, "requests": max(self.faults) + CLEAN + 1}
        return subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(plan)],
            env={**os.environ, **{key: str(value) for key, value in own.items()}},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def _watch(self, processes: Sequence[subprocess.Popen[str]]) -> list[str]:
        """Wait for all but the one that is stopped or killed, and end that."""
        kind, lost, _ = self.faults[max(self.faults)]
        deadline, hung = time.monotonic() + LIMIT, []
        for rank, process in enumerate(processes):
            if rank == lost and kind in FINAL:
                continue
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung.append(f"rank {rank} hangs")
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        return hung

    def _judge(self) -> list[str]:
        """The ranks' answers: never wrong; right in the second request after a failure that leaves all ranks alive."""
        found = []
        end = max(self.faults)
        kind, lost, _ = self.faults[end]
        for rank, answers in enumerate(self.answers):
            found += [f"rank {rank}, request {place}: {text}" for place, text in enumerate(answers) if "wrong" in text]
            if rank == lost and kind in FINAL:
                continue
            due = range(CLEAN, end + CLEAN * (kind not in FINAL), CLEAN + 1)
            found += [
                f"rank {rank}, request {place} is not right: {answers[place : place + 1]}"
                for place in due
                if answers[place : place + 1] != ["right"]
            ]
        return found


def _answers(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    with process.stdout as lines:
        return [line.strip() for line in lines]


def soak(seconds: float, ranks: Sequence[int], seed: int, faults: int = 5) -> int:
    """Episodes for so long; prints each, and returns how many went wrong."""
    chance, end, bad, count, injected = random.Random(seed), time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < end:
        episode = Episode.drawn(chance, ranks[count % len(ranks)], faults)
        wrong = episode.run()
        count, bad, injected = count + 1, bad + bool(wrong), injected + len(episode.faults)
        kinds = ", ".join(f"{kind} on {rank}" for kind, rank, _ in episode.faults.values())
        print(f"{'WRONG' if wrong else 'right'}  {episode.how} {episode.degrees}: {kinds}", flush=True)
        if wrong:
            print("\n".join([str(episode), *wrong]), flush=True)
    print(f"{count} episodes, {injected} failures injected: {bad} with a wrong answer or a hang")
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m xdit_ir.tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], choices=sorted(DEGREES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return min(1, soak(60 * args.minutes, args.ranks, args.seed))


if __name__ == "__main__":
    sys.exit(main())

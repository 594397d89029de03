"""A rank as a process of this host."""

from __future__ import annotations

import multiprocessing
import signal
from typing import Any

from xdit_ir.serving.rank import RankSpec, run_rank

PRELOADED = ["xdit_ir.serving.rank", "diffusers.pipelines.pipeline_utils", "diffusers.loaders.peft"]
FAREWELL = 5.0  # seconds in which a rank may end by itself


class Child:
    """Started at once; `line` is the connection with it."""

    def __init__(self, spec: RankSpec) -> None:
        # Forked from one that has imported what takes long, and has done nothing else: a rank is soon there again.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.line, theirs = context.Pipe()
        self.process: Any = context.Process(target=run_rank, args=(spec, theirs), name=f"rank {spec.rank}", daemon=True)
        self.process.start()
        theirs.close()

    def ended(self, wait: float = 0.0) -> str:
        """How it has ended, if it has within so many seconds; else nothing."""
        self.process.join(wait)
        code = self.process.exitcode
        if code is None:
            return ""
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def stop(self) -> None:
        """Tell it to end."""
        self.line.close()
        self.process.terminate()

    def join(self) -> None:
        """See to it that it has ended."""
        self.process.join(FAREWELL)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()

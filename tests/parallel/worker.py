"""One rank: is sent jobs, answers with JSON."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch


def answer(job: str, arguments: Mapping[str, Any]) -> Any:
    """Run one job; an exception becomes its result."""
    import broken  # type: ignore[import-not-found]
    import cookbook_jobs  # type: ignore[import-not-found]
    import exchanges  # type: ignore[import-not-found]
    import failure_jobs  # type: ignore[import-not-found]
    import guidance_jobs  # type: ignore[import-not-found]
    import jobs  # type: ignore[import-not-found]
    import pipeline_jobs  # type: ignore[import-not-found]
    import replica_jobs  # type: ignore[import-not-found]
    import stage_jobs  # type: ignore[import-not-found]

    try:
        modules = (jobs, exchanges, stage_jobs, pipeline_jobs, broken, failure_jobs, replica_jobs, guidance_jobs)
        function = next(f for module in (*modules, cookbook_jobs) if (f := getattr(module, job, None)))
        return function(**arguments)
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def serve(channel: Connection, environment: Mapping[str, str], log: str) -> None:
    """Serve until nobody is left who asks. What libraries print goes to the log."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    while True:
        try:
            job, arguments = channel.recv()
        except EOFError:
            return
        channel.send(json.dumps(answer(job, arguments)))

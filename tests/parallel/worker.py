"""One rank: reads jobs as lines of JSON, answers with lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> Any:
    """Run one job; an exception becomes its result."""
    import broken  # type: ignore[import-not-found]
    import exchanges  # type: ignore[import-not-found]
    import failure_jobs  # type: ignore[import-not-found]
    import jobs  # type: ignore[import-not-found]
    import pipeline_jobs  # type: ignore[import-not-found]
    import stage_jobs  # type: ignore[import-not-found]

    try:
        modules = (jobs, exchanges, stage_jobs, pipeline_jobs, broken, failure_jobs)
        function = next(f for module in modules if (f := getattr(module, request["job"], None)))
        return function(**request["arguments"])
    except Exception as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    """Serve until standard input closes. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        sys.path.insert(0, str(Path(__file__).parent))
        for line in sys.stdin:
            channel.write(json.dumps(answer(json.loads(line))) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()

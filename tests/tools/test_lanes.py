"""How scripts of tests/gpu share out tasks, keep results and go on; here without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "gpu"
SCRIPT = """
import json, os, sys
sys.path.insert(0, {folder!r})
import lanes

if sys.argv[1:2] == ["--worker"]:
    mode, said, tasks, alone = json.loads(sys.argv[2])
    for model, degrees in tasks:
        if model == "ends":
            os._exit(5)
        with open(said, "a") as file:
            result = {{"model": model, "degrees": degrees, "status": "equal", "error": 0.0, "seconds": 1.0}}
            result |= {{"process": os.getpid(), "world": os.environ["WORLD_SIZE"]}}
            file.write(json.dumps(result) + "\\n")
    os._exit(0)
given = lanes.arguments("", degrees="u2", lanes=2, fresh={fresh}).parse_args()
sys.exit(lanes.share_out(given, given.names))
"""


def ran(script: Path, *given: str) -> tuple[int, list[dict[str, Any]], str]:
    """The status, what is in the file of results, and what was printed."""
    output = script.with_suffix(".json")
    command = [sys.executable, str(script), "--ranks", "1", *given, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(output.read_text()), done.stdout + done.stderr


def test_results_are_kept_and_a_second_run_does_what_is_missing(tmp_path: Path) -> None:
    """A group of processes that ends fails its task only; what failed is tried again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER), fresh=False))
    status, results, said = ran(script, "a", "ends", "b", "c@r2")
    assert status == 1, said
    assert {(one["model"], one["degrees"]): one["status"] for one in results} == {
        ("a", "u2"): "equal",
        ("b", "u2"): "equal",
        ("c", "r2"): "equal",
        ("ends", "u2"): "failed",
    }
    status, results, said = ran(script, "a", "ends", "d", "--resume")
    assert [line.split()[:2] for line in said.splitlines()[:-1]] in (
        [["failed", "ends"], ["equal", "d"]],
        [["equal", "d"], ["failed", "ends"]],
    )
    assert status == 1 and sorted(one["model"] for one in results) == ["a", "b", "c", "d", "ends"]


def test_every_task_can_have_processes_of_its_own_as_many_as_it_divides_by(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(FOLDER), fresh=True))
    status, results, said = ran(script, "--ranks", "0", "--lanes", "1", "a@u1+way", "b@u1", "c@t2")
    assert status == 0, said
    assert len({one["process"] for one in results}) == 4
    assert sorted((one["model"], one["world"]) for one in results) == [("a", "1"), ("b", "1"), ("c", "2"), ("c", "2")]


def test_a_way_says_degrees_and_options() -> None:
    code = "import lanes; print(lanes.degrees_of({0!r}), lanes.options_of({0!r}, ['int8']))"
    said = {
        way: subprocess.run([sys.executable, "-c", code.format(way)], cwd=FOLDER, capture_output=True, text=True).stdout
        for way in ("u2", "c2u2+sharded", "u1+stream=1GiB+int8", "u1+stream+recorded", "u2+shards")
    }
    assert said == {
        "u2": "{'ulysses': 2} {}\n",
        "c2u2+sharded": "{'cfg': 2, 'ulysses': 2} {'shard_weights': True}\n",
        "u1+stream=1GiB+int8": "{'ulysses': 1} {'stream_weights': '1GiB'}\n",
        "u1+stream+recorded": "{'ulysses': 1} {'stream_weights': True, 'mode': 'graph'}\n",
        "u2+shards": "",
    }, "what is neither raises"

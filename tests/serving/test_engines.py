"""The example of docs/serving.md with another engine: with --large, where that engine is installed."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
SHARE = """

@plugin_hook(f"{BACKEND.rpartition('.')[0]}.DiffusersExecutionStage.forward")
def shared(batch, stage, *_):
    print("share", stage.diffusers_pipe.transformer.report().share, flush=True)
"""
PROMPT, SIZE, LIMIT = "a lighthouse at dusk", 128, 500


def example() -> str:
    """The script of the page, which also says after each request what part of the work a rank did."""
    [script] = re.findall(r"```python\n(# serve_ported\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    begin, main, rest = script.partition('\n\nif __name__ == "__main__":')
    return begin + SHARE + main + rest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path, pipeline_folder: Path) -> Iterator[tuple[str, Path]]:
    """Its address and log."""
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: starts another engine")
    pytest.importorskip("sglang.multimodal_gen.runtime.platforms.plugins", exc_type=ImportError)
    (tmp_path / "serve_ported.py").write_text(example())
    port, log = free_port(), tmp_path / "log"
    where = ["--host", "127.0.0.1", "--port", str(port), "--output-path", str(tmp_path)]
    what = [
        "--backend",
        "diffusers",
        "--model-path",
        str(pipeline_folder),
        "--num-gpus",
        "2",
        "--dit-precision",
        "fp32",
    ]
    command = [sys.executable, "serve_ported.py", *what, *where]
    with log.open("w") as output:
        settings = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=settings, stdout=output, stderr=output)
        try:
            _until_open(process, port, log)
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()
            process.wait(60)


def _until_open(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + LIMIT
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(1)


def _alone(folder: Path) -> np.ndarray[Any, Any]:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    how = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 4.5, "output_type": "np"}
    made: np.ndarray[Any, Any] = pipe(PROMPT, generator=torch.Generator().manual_seed(1), **how).images[0]
    return made


@pytest.mark.timeout(2 * LIMIT)
def test_workers_of_another_engine_share_an_image(server: tuple[str, Path], pipeline_folder: Path) -> None:
    from PIL import Image

    address, log = server
    body = {
        "prompt": PROMPT,
        "size": f"{SIZE}x{SIZE}",
        "seed": 1,
        "response_format": "b64_json",
        "output_format": "png",
    }
    body |= {"num_inference_steps": 2, "guidance_scale": 4.5, "generator_device": "cpu"}
    head = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{address}/v1/images/generations", json.dumps(body).encode(), head)
    with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
        [item] = json.load(answer)["data"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), dtype=float)
    want = _alone(pipeline_folder)
    assert want.std() > 0.1 and np.abs(image / 255 - want).max() < 1.5 / 255
    shares = [float(share) for share in re.findall(r"share ([\d.]+)", log.read_text())]
    assert len(shares) == 2 and max(shares) < 0.51

"""The examples of docs/serving.md with other engines: with --large, where these are installed."""

from __future__ import annotations

import base64
import importlib.util
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
PROMPT, LIMIT = "a lighthouse at dusk", 500
HOW = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 4.5}


def example(name: str) -> str:
    """A file of the page."""
    [found] = re.findall(rf"```python\n(# {name}\b.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


def serving() -> str:
    """The script of the page, which also says after each request what part of the work a rank did."""
    begin, main, rest = example("serve_ported.py").partition('\n\nif __name__ == "__main__":')
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
    (tmp_path / "serve_ported.py").write_text(serving())
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
    seed = torch.Generator().manual_seed(1)
    made: np.ndarray[Any, Any] = pipe(PROMPT, generator=seed, output_type="np", **HOW).images[0]
    return made


@pytest.mark.timeout(2 * LIMIT)
def test_workers_of_another_engine_share_an_image(server: tuple[str, Path], pipeline_folder: Path) -> None:
    from PIL import Image

    address, log = server
    body = {"prompt": PROMPT, "seed": 1, "output_format": "png", "response_format": "b64_json", **HOW}
    body |= {"size": f"{HOW['width']}x{HOW['height']}", "generator_device": "cpu"}
    head = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{address}/v1/images/generations", json.dumps(body).encode(), head)
    with urllib.request.urlopen(asked, timeout=LIMIT) as answer:
        [item] = json.load(answer)["data"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), dtype=float)
    want = _alone(pipeline_folder)
    assert want.std() > 0.1 and np.abs(image / 255 - want).max() < 1.5 / 255
    shares = [float(share) for share in re.findall(r"share ([\d.]+)", log.read_text())]
    assert len(shares) == 2 and max(shares) < 0.51


@pytest.mark.timeout(LIMIT)
def test_workers_of_a_backend_share_an_image(
    request: pytest.FixtureRequest, tmp_path: Path, pipeline_folder: Path
) -> None:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: imports another engine")
    if importlib.util.find_spec("vllm_omni") is None:
        pytest.skip("needs vllm_omni")
    (tmp_path / "ported.py").write_text(example("ported.py"))
    installed = tmp_path / "ported-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: ported\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[vllm_omni.general_plugins]\nported = ported:register\n")
    script, output = Path(__file__).with_name("adapted.py"), tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = [*command, str(pipeline_folder), json.dumps([PROMPT, {"seed": 1, **HOW}]), str(output)]
    done = subprocess.run(run, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    image, share = torch.load(output)
    want = torch.from_numpy(_alone(pipeline_folder)).permute(2, 0, 1)
    assert (image - want).abs().max() < 1e-4 and share < 0.51

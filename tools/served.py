"""What a client of `xdit-ir serve` gets, and what it should have got."""

from __future__ import annotations

import base64
import functools
import io
import json
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import torch
from PIL import Image

from xdit_ir.generation.generate import called
from xdit_ir.generation.meter import Meter
from xdit_ir.generation.setup import Setup
from xdit_ir.serving.app import PlainBody, request_of

Body = dict[str, Any]
Images = list[np.ndarray[Any, Any]]
LIMIT = 300.0  # seconds for an answer, and for a start


def ask(port: int, path: str, body: Any = None, method: str | None = None, host: str = "127.0.0.1") -> tuple[int, Any]:
    """Status and content of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://{host}:{port}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def until_ready(process: subprocess.Popen[Any], port: int, host: str = "127.0.0.1") -> None:
    """Wait for a server that was started."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            if ask(port, "/health", host=host)[0] == 200:
                return
        except OSError:  # nobody listens yet
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"the server is not ready; its status: {process.returncode}")
        time.sleep(0.1)


def images(content: Any) -> Images:
    """Those of an answer, of either endpoint."""
    texts = [one.get("b64_json") or one["b64"] for one in content.get("data") or content["items"]]
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int) for text in texts]


class Alone:
    """The same pipeline in one process: this one."""

    def __init__(self, folder: str) -> None:
        setup = Setup(folder, {"ulysses": 1}, torch.float32, (), whole=False, offload=False, data=1)
        self.meter = Meter(torch.device("cpu"))
        self.pipe = setup.pipeline(setup.start((), "cpu"), self.meter)
        self.pipe.set_progress_bar_config(disable=True)
        self.made = functools.cache(self._made)

    def _made(self, text: str) -> Images:
        body = PlainBody(**json.loads(text))
        request = request_of(body, body.prompt, body.width, body.height, body.frames)
        call = request.calls(self.pipe)[0]
        return [np.array(image).astype(int) for image in called(self.pipe, request, call, self.meter)]

    def wrong(self, body: Body, content: Any) -> str:
        """What is wrong with an answer; rounding may differ by one of 255."""
        want, got = self.made(json.dumps(body)), images(content)
        if [one.shape for one in got] != [one.shape for one in want]:
            return f"has the shapes {[one.shape for one in got]}, expected {[one.shape for one in want]}"
        off = max(int(abs(a - b).max()) for a, b in zip(got, want, strict=True))
        return f"differs by {off} of 255" if off > 1 else ""

"""What a further shape of a ported model costs on the host, without GPUs: `python benchmarks/further_shapes.py`.

The denoiser of FLUX.1-dev in its published size, one rank of two that never talk. Its weights lie in memory that nobody
touches; the program is traced, divided, verified and written as code for a GPU, and neither compiled nor run. Prints
seconds of processor time for each of six shapes; the first is that of an unknown structure.
"""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.execution import Execution
from xdit_ir.passes.order import rank_passes
from xdit_ir.runtime.runner import Runner

# Height, width, tokens of text.
SHAPES = ((1024, 1024, 512), (1024, 768, 512), (832, 1216, 512), (1024, 1024, 256), (1008, 1008, 512), (768, 1344, 333))


def resized(example: dict[str, Any], height: int, width: int, text: int) -> dict[str, Any]:
    """The arguments for an image of this size and so many tokens of text, all of them zero."""
    tokens = height // 16 * (width // 16)
    count = {"hidden_states": (1, tokens), "encoder_hidden_states": (1, text), "img_ids": (tokens,), "txt_ids": (text,)}
    return {
        name: torch.zeros(*count.get(name, value.shape[:-1]), value.shape[-1], dtype=value.dtype)
        for name, value in example.items()
        if isinstance(value, torch.Tensor)
    } | {name: value for name, value in example.items() if not isinstance(value, torch.Tensor)}


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # type: ignore[no-untyped-call]
    model, example = models.load("flux.1-dev", device="meta", dtype=torch.bfloat16)
    model = model.eval().to_empty(device="cpu")
    passes = rank_passes((9, 0), "sdpa", compiled=True, recorded=True)
    with (
        torch.no_grad(),
        mock.patch.object(Execution, "passes", lambda *_: passes),
        mock.patch.object(torch, "compile", lambda function, **_: function),
        mock.patch.object(Runner, "run", lambda *_: None),
    ):
        port = xir.port(model, ulysses=2, mode="compiled", handshake=False)
        for shape in SHAPES:
            given = resized(example, *shape)
            start = time.process_time()
            port(**given)
            print(f"{shape}: {time.process_time() - start:.2f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

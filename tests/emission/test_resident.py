"""Resident memory of one rank while it gets its weights from more than a gigabyte; with `--large` only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A rank of a pipeline: prints MiB of its weights and of all, how much more is resident with them, and how much was at
# most on the way there. `own`: from a loaded model, which is released, instead of from the checkpoint.
RANK = """
import json, sys
from pathlib import Path
import torch, xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.checkpoint import Checkpoint
from xdit_ir.emission.weight_store import WeightStore
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024

folder, rank, own = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "own"
with init_empty_weights():
    model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder)).to(torch.bfloat16).eval()
_, example = models.load("flux.1-dev", device="meta", dtype=torch.bfloat16)
parallel = xir.trace(model, example).parallelize(pipefusion=2)
names, specs = parallel.pipeline.weights_of(rank), parallel.original.state
if own:
    model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(0.5)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
store = WeightStore(model, torch.device("cpu"), None if own else Checkpoint(folder), release=own)
held = store.take(names, specs)
mine, total = (sum(specs[name].nbytes for name in some) / 2**20 for some in (names, specs))
assert sum(x.nbytes for x in held.fetch()) / 2**20 == mine
print(json.dumps({"mine": mine, "total": total, "more": status("VmRSS") - before, "most": status("VmHWM") - before,
                  "largest": max(specs[name].nbytes for name in names) / 2**20}))
"""


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not request.config.getoption("--large"):
        pytest.skip("needs --large: writes more than a gigabyte")
    import torch
    from diffusers import FluxTransformer2DModel

    path = tmp_path_factory.mktemp("large")
    sizes = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 12, "guidance_embeds": True}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.25)
    model.save_pretrained(path, max_shard_size="400MB")
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) >= 1e9
    return path


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("source", ["checkpoint", "own"])
def test_a_rank_holds_its_own_weights_only(folder: Path, rank: int, source: str) -> None:
    command = [sys.executable, "-c", RANK, str(folder), str(rank), source]
    # What is freed goes back to the system at once, so that it can be seen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(source, rank, {name: round(value) for name, value in found.items()}, "MiB")
    assert found["mine"] <= 1.1 / 2 * found["total"]
    if source == "own":
        assert found["more"] <= found["mine"] - found["total"] + 32, "what other ranks use was given back"
        assert found["most"] <= 32, "nothing was held twice"
    else:
        assert found["more"] <= found["mine"] + 32
        assert found["most"] <= found["mine"] + found["largest"] + 32, "one tensor of a file at a time"

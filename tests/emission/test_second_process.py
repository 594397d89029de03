"""What one process has compiled, another finds on disk: no name, number or object of a process is part of the code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import json, sys
import torch, torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore
import xdit_ir as xir

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + F.gelu(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

model = nn.Sequential(*(Layer() for _ in range(3))).eval()
x = torch.randn(2, int(sys.argv[1]), 32)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
with torch.no_grad():
    xir.port(model, ulysses=2, mode="compiled", handshake=False)(x)
dist.destroy_process_group()
with torch.no_grad():
    port = xir.port(model, mode="compiled")
    torch.testing.assert_close(port(x), model(x))
traced = dict(counters["stats"])
with torch.no_grad():
    torch.use_deterministic_algorithms(True)  # of which code is told when it is made
    port(x)
assert counters["stats"]["unique_graphs"] > traced.get("unique_graphs", 0)
counters["stats"] = traced
print(json.dumps({name: dict(counters[name]) for name in ("stats", "inductor", "aot_autograd")}))
"""


def compiled_in_a_process(folder: Path, tokens: int) -> dict[str, dict[str, Any]]:
    """Counters of a process whose cache on disk is in `folder`."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tokens)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_process_traces_and_compiles_nothing(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Blocks with exchanges inside, u2, and without: neither for the shape that the first process had, nor another."""
    if not request.config.getoption("--large"):
        pytest.skip("three processes, of which one compiles for a quarter of a minute (--large)")
    first = compiled_in_a_process(tmp_path, 100)
    assert first["stats"]["unique_graphs"] == 2
    for tokens in (100, 132):
        again = compiled_in_a_process(tmp_path, tokens)
        assert not again["stats"], "nothing was traced for the compiler"
        counted = {**again["inductor"], **again["aot_autograd"]}
        assert not [key for key in counted if key.endswith(("cache_miss", "cache_bypass"))], counted

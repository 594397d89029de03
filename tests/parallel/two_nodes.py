"""One rank of a job on several hosts: ports of a small model, each compared with the model alone.

`python -m torch.distributed.run ... tests/parallel/two_nodes.py OUTPUT CASES`: CASES is a list of arguments of `port`;
every rank writes a file in the folder OUTPUT.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.difference import relative_error
from xdit_ir.transport.spread import crossing, host

MORE = {"num_attention_heads": 8, "num_layers": 2, "num_single_layers": 2}


def ran(given: dict[str, Any]) -> dict[str, Any]:
    """What came of a port: of every call the error, degrees, and what was said of the plan."""
    tiny, example = models.load("flux.1-dev:tiny")
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_config(dict(tiny.config) | MORE).eval()
    batch = given.get("cfg", 1)
    example = {
        name: torch.cat([x] * batch) if isinstance(x, torch.Tensor) and not name.endswith("ids") else x
        for name, x in example.items()
    }
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("xdit_ir").addHandler(handler)
    logging.getLogger("xdit_ir").setLevel(logging.INFO)
    with torch.inference_mode():
        want = model(**example)
        ported = xir.port(model, machine=xir.Machine(), **given)
        error = relative_error(ported(**example), want)
    assert ported.program is not None
    mesh, hosts = ported.program.mesh, [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host())
    ported.reset()
    return {"error": error, "degrees": mesh.degrees, "across": crossing(mesh, hosts), "hosts": hosts, "said": said}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = [ran(given) for given in json.loads(sys.argv[2])]
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)

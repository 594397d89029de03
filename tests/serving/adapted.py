"""One of two processes that run a request by vLLM-Omni's diffusers backend as its workers do, with plugins loaded.

`torchrun ... adapted.py FOLDER REQUEST OUTPUT`: the first process writes the image there, and its part of the work.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter import DiffusersAdapterPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.plugins import load_omni_general_plugins

if __name__ == "__main__":
    folder, request, output = sys.argv[1:]
    load_omni_general_plugins()
    dist.init_process_group("gloo")
    how = {"num_gpus": dist.get_world_size(), "dtype": torch.float32}
    config = OmniDiffusionConfig(model=folder, diffusion_load_format="diffusers", **how)
    backend = DiffusersAdapterPipeline(od_config=config, device=torch.device("cpu"))
    backend.load_weights()
    prompt, given = json.loads(request)
    sampling = OmniDiffusionSamplingParams(**given, generator_device="cpu", output_type="pt")
    made = backend.forward(DiffusionRequestBatch([OmniDiffusionRequest(prompt, sampling, "0")]))
    if dist.get_rank() == 0:
        torch.save((made.output[0], backend._pipeline.transformer.report().share), output)
    dist.barrier()
    os._exit(0)

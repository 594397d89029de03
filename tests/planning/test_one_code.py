"""By the prices of a GPU, ranks run one code for all lengths of text: a new length of text compiles nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.ir.program import SPEC
from xdit_ir.planning.hardware import load

Case = tuple[nn.Module, dict[str, Any]]


@pytest.fixture(scope="module")
def flux() -> Case:
    """FLUX.1-dev of published width, two blocks of each kind, without values."""
    model, example = models.load("flux.1-dev", device="meta", dtype=torch.bfloat16)
    for layers in (module for module in model.children() if isinstance(module, nn.ModuleList)):
        del layers[2:]
    return model, example


@pytest.mark.parametrize("machine", ["h100", "h200", "rtx4090"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("text", [512, 256, 128])
def test_every_rank_has_a_part_of_text_and_image(flux: Case, machine: str, ranks: int, text: int) -> None:
    """Shorter text is cheaper on one rank, by a thousandth: others would have code without text, for this length."""
    model, example = flux
    words = {"encoder_hidden_states": torch.empty(1, text, 4096, dtype=torch.bfloat16, device="meta")}
    words |= {"txt_ids": torch.empty(text, 3, dtype=example["txt_ids"].dtype, device="meta")}
    parallel = xir.trace(model, example | words).parallelize(ulysses=ranks, machine=load(machine).prices)
    for rank in range(ranks):
        given = parallel.rank(rank).blocks["FluxTransformerBlock"].graph.find_nodes(op="placeholder")
        tokens = {node.meta[SPEC].shape[1] for node in given if len(node.meta[SPEC].shape) == 3}
        assert {4096 // ranks, text // ranks} <= tokens

"""The zoo: tiny models are lively and deterministic, full ones have the published size and cost no memory."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from xdit_ir import models

NAMES = [
    "cogvideox-5b",
    "flux.1-dev",
    "hunyuandit",
    "latte-1",
    "pixart-sigma",
    "qwen-image",
    "sana-1600m",
    "sd3.5-large",
    "wan2.1-t2v-14b",
]
BILLIONS = dict(zip(NAMES, [5.57, 11.90, 1.50, 1.06, 0.611, 20.43, 1.604, 8.06, 14.29], strict=True))
MASKS = {
    "hunyuandit": "text_embedding_mask",
    "pixart-sigma": "encoder_attention_mask",
    "qwen-image": "encoder_hidden_states_mask",
    "sana-1600m": "encoder_attention_mask",
}


def run(model: torch.nn.Module, example: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        (output,) = model(**example)
    assert isinstance(output, torch.Tensor)
    return output


def last_entry_changed(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed[-1] = changed[-1].roll(1) if value.ndim > 1 else changed[-1] * 0.5
    return changed


def test_names() -> None:
    assert models.names() == sorted(models.names())
    assert set(NAMES) <= set(models.names())


def test_an_entry_without_a_published_size_is_tiny_only() -> None:
    name = next(name for name in models.names() if models.entry(name).full is None)
    with pytest.raises(LookupError, match=f"{name}:tiny"):
        models.load(name)


@pytest.mark.parametrize("name", ["flux.1-def", "FLUX.1-dev", "flux.1-dev:huge", "flux.1-dev:"])
def test_unknown_name_lists_the_nearest(name: str) -> None:
    with pytest.raises(LookupError, match=r"flux\.1-dev:tiny"):
        models.load(name)


@pytest.mark.parametrize("name", models.names())
def test_an_entry_is_short(name: str) -> None:
    family = next(m for m in models.families() if name in m.ENTRIES)
    lines = inspect.getsource(family).split("ENTRIES = {\n")[1].splitlines()
    assert len(lines) - 1 <= 25 * len(family.ENTRIES)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_is_sane_and_deterministic(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    output = run(model, example)
    assert output.isfinite().all()
    assert 0.05 < output.std() < 20
    assert not torch.allclose(output[0], output[1], rtol=0.1, atol=0.1)
    again, other = (run(*models.load(f"{name}:tiny", seed=seed)) for seed in (0, 1))
    assert torch.equal(output, again)
    assert not torch.allclose(output, other, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_depends_on_every_input_per_sample(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    before = run(model, example)
    for key in ("hidden_states", "timestep", "encoder_hidden_states"):
        after = run(model, {**example, key: last_entry_changed(example[key])})
        assert torch.allclose(after[0], before[0], atol=1e-5), key
        assert (after[1] - before[1]).abs().max() > 1e-2, key


@pytest.mark.parametrize("name", sorted(MASKS))
def test_tiny_masks_are_ragged_and_used(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    mask = example[MASKS[name]]
    assert not torch.equal(mask[0], mask[1])
    change = run(model, example) - run(model, {**example, MASKS[name]: torch.ones_like(mask)})
    assert change[0].abs().max() < 1e-5 and change[1].abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_is_constant(name: str) -> None:
    model, _ = models.load(f"{name}:tiny")
    assert not [key for key, value in model.named_parameters() if value.numel() > 1 and value.std() < 1e-3]


@pytest.mark.parametrize("name", NAMES)
def test_full_model_costs_nothing_on_meta(name: str) -> None:
    model, example = models.load(name, device="meta", dtype=torch.bfloat16)
    parameters = list(model.parameters())
    assert all(value.is_meta for value in [*parameters, *model.buffers()])
    assert sum(value.numel() for value in parameters) / 1e9 == pytest.approx(BILLIONS[name], rel=0.03)
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    assert all(value.is_meta or value.numel() < 20_000 for value in tensors)
    assert all(value.is_meta or value.dtype != torch.bfloat16 or value.ndim <= 2 for value in tensors)
    output = run(model, tree_map_only(torch.Tensor, lambda value: value.to("meta"), example))
    latents = example["hidden_states"]
    assert output.is_meta and output.shape[0] == latents.shape[0] and output.dtype == torch.bfloat16
    assert output.numel() in (latents.numel(), 2 * latents.numel())  # some also predict a variance


@pytest.mark.parametrize("name", NAMES)
def test_full_and_tiny_have_the_same_signature(name: str) -> None:
    data = models.entry(name)
    assert set(data.full_inputs) == set(data.tiny_inputs)
    assert set(data.full) - set(data.tiny) == set()


def test_reduced_precision_keeps_what_the_class_keeps() -> None:
    model, example = models.load("wan2.1-t2v-14b:tiny", dtype=torch.bfloat16)
    dtypes = {key: value.dtype for key, value in model.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert run(model, example).isfinite().all()
    assert torch.get_default_dtype() == torch.float32


def test_position_inputs_are_those_of_the_pipelines() -> None:
    from diffusers import FluxPipeline
    from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed

    def made(name: str, key: str) -> list[torch.Tensor]:
        tiny = models.load(f"{name}:tiny")[1][key]
        return [leaf for leaf in tree_flatten(tiny)[0] if isinstance(leaf, torch.Tensor)]

    ids = FluxPipeline._prepare_latent_image_ids(1, 16, 16, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(made("flux.1-dev", "img_ids"), [ids])
    video = get_3d_rotary_pos_embed(16, ((0, 0), (8, 8)), (8, 8), 4)
    torch.testing.assert_close(made("cogvideox-5b", "image_rotary_emb"), list(video))
    image = get_2d_rotary_pos_embed(16, ((0, 0), (16, 16)), (16, 16))
    torch.testing.assert_close(made("hunyuandit", "image_rotary_emb"), list(image))

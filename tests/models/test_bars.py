"""What the zoo must be so that a test over it means something; each exception has its reason, and none is stale."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import diffusers.models.transformers as library
import pytest
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from xdit_ir import models

NAMES = models.names()
FULL = [name for name in NAMES if models.entry(name).full is not None]
FEW_LAYERS = {"dual-transformer": "two transformers of two layers each"}
FEW_TOKENS = {
    "kandinsky-2.2-prior": "denoises one image embedding behind the text",
    "minimax-music-3-depth": "one audio frame",
}
ONE_SAMPLE = {
    "cosmos3-omni": "the class takes one packed sample",
    "transformer-temporal": "frames in the batch: two samples of four",
}
SAME_FOR_ALL = {("qwen-image-2.1", "['img_mask']"): "where images are in the sequence: the class takes one layout"}


@functools.cache
def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return models.load(f"{name}:tiny")


def tensors(example: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an example with their paths."""
    for path, leaf in tree_flatten_with_path(example)[0]:
        if isinstance(leaf, torch.Tensor):
            yield keystr(path), leaf


def test_every_exported_class_has_an_entry() -> None:
    exported = {name for name, value in vars(library).items() if inspect.isclass(value)}
    assert len(exported) == 76
    assert exported <= {models.entry(name).cls for name in NAMES}


def test_what_is_no_denoiser_says_why() -> None:
    """A class without the word is run by a pipeline's denoising loop: it takes a timestep, under whatever name."""
    silent = [name for name in NAMES if not models.entry(name).no_denoiser]
    timeless = [name for name in silent if not any(key[0] == "t" or "time" in key for key in tiny(name)[1])]
    assert timeless == []
    assert len(NAMES) - len(silent) == 6


def layers(model: nn.Module) -> int:
    """Members of the outermost lists of modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return sum(len(found) for name, found in lists if not any(part.isdigit() for part in name.split(".")))


def test_at_least_three_layers() -> None:
    assert {name for name in NAMES if layers(tiny(name)[0]) < 3} == set(FEW_LAYERS)


def test_full_sizes() -> None:
    assert len(FULL) >= 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every third of the published sizes, all of them with `--zoo-all`."""
    if "full" in metafunc.fixturenames:
        metafunc.parametrize("full", FULL if metafunc.config.getoption("--zoo-all") else FULL[::3])


def test_tiny_keeps_every_kind_of_module(full: str) -> None:
    large, _ = models.load(full, device="meta")
    assert {type(module) for module in large.modules()} <= {type(module) for module in tiny(full)[0].modules()}


def widest(name: str) -> int:
    """The most rows that a linear layer inside the model's layers sees."""
    model, example = tiny(name)
    rows = [0]
    hooks = [
        module.register_forward_hook(lambda _, __, out: rows.append(out.numel() // out.shape[-1]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
    ]
    with torch.no_grad():
        model(**example)
    for hook in hooks:
        hook.remove()
    return max(rows)


def test_at_least_256_image_tokens_a_sample(pytestconfig: pytest.Config) -> None:
    """Each third model runs; all with `--zoo-all`."""
    names = NAMES if pytestconfig.getoption("--zoo-all") else NAMES[::3]
    few = {name for name in names if widest(name) < 256 * (1 if name in ONE_SAMPLE else 2)}
    assert few == {*FEW_TOKENS} & {*names}


def test_two_samples() -> None:
    def samples(value: Any) -> int:
        return len(value) if isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim) else 0

    assert {name for name in NAMES if 2 not in map(samples, tiny(name)[1].values())} == set(ONE_SAMPLE)


def test_masks_are_ragged() -> None:
    same = {
        (name, path)
        for name in NAMES
        for path, tensor in tensors(tiny(name)[1])
        if "mask" in path and tensor.ndim > 1 and len(tensor) == 2 and torch.equal(tensor[0], tensor[1])
    }
    assert same == set(SAME_FOR_ALL)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_lively(name: str) -> None:
    """No gate is zero and nothing is constant; matrices have a standard deviation of about 1 / sqrt(fan_in)."""
    model, _ = tiny(name)
    for key, value in model.named_parameters():
        assert value.numel() == 1 or value.std() > 1e-3, key
        scaled_in_forward = isinstance(getattr(model.get_submodule(key.rpartition(".")[0]), "scale", None), float)
        if key.endswith(".weight") and value.ndim > 1 and not scaled_in_forward:
            assert 0.5 < value.std() * value[0].numel() ** 0.5 < 2, key

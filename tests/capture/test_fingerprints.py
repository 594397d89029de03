"""What decides what a module computes is described again as soon as any of it is another, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xdit_ir.reflection.fingerprint import Fingerprints, fingerprint


class Settings:
    def __init__(self) -> None:
        self.sizes, self.names = [1, [2]], {"a": 1}


class Inner(nn.Linear):
    pass


class Model(nn.Module):
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Inner(4, 4) for _ in range(2))
        self.settings, self.cache, self.empty = Settings(), [None, {"x": 0}], dict[str, int]()
        self.register_buffer("table", torch.zeros(3))
        self.numbers, self.scale, self.call = np.zeros(3), 1.0, self.layers[0].forward


def _hook(model: Model) -> None:
    model.layers[1].register_forward_hook(lambda *given: None)


CHANGES: dict[str, Callable[[Any], None]] = {
    "an attribute": lambda model: setattr(model, "scale", 2.0),
    "a new attribute": lambda model: setattr(model, "other", None),
    "an attribute below": lambda model: setattr(model.layers[1], "in_features", 5),
    "an entry": lambda model: model.cache.__setitem__(0, 1),
    "an entry below": lambda model: model.cache[1].update(x=1),
    "one more": lambda model: model.cache.append(None),
    "what was empty": lambda model: model.empty.update(a=1),
    "an object's list": lambda model: model.settings.sizes[1].append(3),
    "an object's dict": lambda model: model.settings.names.update(b=2),
    "an array": lambda model: model.numbers.__setitem__(0, 1),
    "a hook": _hook,
    "another buffer": lambda model: setattr(model, "table", torch.zeros(4)),
    "the size of a buffer": lambda model: model.table.resize_(4),
    "the type of a weight": lambda model: setattr(model.layers[0].weight, "data", torch.zeros(4, 4).half()),
    "tied weights": lambda model: setattr(model.layers[0], "weight", model.layers[1].weight),
    "a module's class": lambda model: setattr(model.layers[0], "__class__", nn.Linear),
    "a module less": lambda model: model.layers.__delitem__(1),
    "a method": lambda model: setattr(model, "call", model.layers[1].forward),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    model = Model()
    prints = Fingerprints({})
    before = prints.of(model)
    CHANGES[change](model)
    after = prints.of(model)
    assert after == fingerprint(model, {})
    assert after != before


def test_what_has_not_changed_is_described_once() -> None:
    model = Model().requires_grad_(False)
    prints = Fingerprints({})
    before = prints.of(model)
    model.table.add_(1)  # contents of state are no part of it
    assert prints.of(model) is before

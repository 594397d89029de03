"""Whatever forward may read besides tensors is noticed when it changes, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.porting.settings import ModelSettings


class Processor:
    def __init__(self) -> None:
        self.scale = 1.0
        self.options: dict[str, Any] = {}


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(2, 2), nn.GELU()
        self.scaling = {"one": 1.0}
        self.active, self.merged = ["one"], set[str]()
        self.nested = ([{"deep": 1}], 2)
        self.processor = Processor()
        self.constant, self.array = torch.ones(2), np.ones(2)
        self.fused = False


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])
        self.tied = [self.parts[0].linear.weight]

    @property
    def last(self) -> Any:
        return self.parts[1]


CHANGES: dict[str, Callable[[Model], Any]] = {
    "number": lambda model: setattr(model.last, "fused", True),
    "entry": lambda model: model.last.scaling.update(one=0.5),
    "new entry": lambda model: model.last.scaling.update(two=1.0),
    "list": lambda model: model.last.active.append("two"),
    "empty set": lambda model: model.last.merged.add("one"),
    "inside a tuple": lambda model: model.last.nested[0][0].update(deep=2),
    "object": lambda model: setattr(model.last.processor, "scale", 2.0),
    "empty dict of an object": lambda model: model.last.processor.options.update(a=1),
    "another object": lambda model: setattr(model.last, "processor", Processor()),
    "equal but other container": lambda model: setattr(model.last, "scaling", {"one": 1.0}),
    "new attribute": lambda model: setattr(model.last, "extra", 1),
    "lost attribute": lambda model: delattr(model.last, "fused"),
    "module without weights": lambda model: setattr(model.last, "act", nn.ReLU()),
    "new module": lambda model: model.last.add_module("more", nn.ReLU()),
    "hook": lambda model: model.last.linear.register_forward_hook(lambda *_: None),
    "write to a constant": lambda model: model.last.constant.mul_(2),
    "another constant": lambda model: setattr(model.last, "constant", torch.ones(2)),
    "another array": lambda model: setattr(model.last, "array", np.ones(2)),
    "mode": lambda model: model.last.train(not model.last.training),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    model = Model()
    settings = ModelSettings(model)
    assert settings.unchanged()
    CHANGES[change](model)
    assert not settings.unchanged()
    assert ModelSettings(model).unchanged()


@pytest.mark.parametrize("change", CHANGES)
def test_earlier_settings_stand_for_new_ones_until_something_changes(change: str) -> None:
    """Also what is asked for: of the same model, with the same code among the arguments, and all of it read."""
    model, act = Model(), nn.ReLU()
    earlier = [ModelSettings(model)]
    assert ModelSettings.like(earlier, model, [3, None, "text"]) is earlier[0]
    assert ModelSettings.like(earlier, model, [act.forward]) is not earlier[0]
    assert ModelSettings.like(earlier, model, unread={(id(vars(model.last)), "scale")}) is not earlier[0]
    assert ModelSettings.like(earlier, Model()) is not earlier[0]
    CHANGES[change](model)
    assert ModelSettings.like(earlier, model) is not earlier[0]


def test_weights_are_not_part_of_it() -> None:
    model = Model()
    settings = ModelSettings(model)
    model.load_state_dict(Model().state_dict())
    model.double()
    assert settings.unchanged()
    model.last.fused = True
    model.last.fused = False
    assert settings.unchanged(), "what is as before is no change"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling = {"one": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scaling["one"]


def test_a_port_traces_anew_and_finds_what_it_made_before() -> None:
    model = Scaled()
    ported, x = xir.port(model), torch.ones(2)
    for by, programs in ((1.0, 1), (3.0, 2), (3.0, 2), (1.0, 2), (2.0, 3)):
        model.scaling["one"] = by
        assert ported(x).tolist() == [by, by]
        assert len(ported.programs) == programs


@pytest.mark.parametrize("name", ["hidream-i1", "wan2.1-t2v-14b"])
def test_forward_itself_is_no_change(name: str) -> None:
    """Nor is what runs whole in an opaque leaf, nor the original's own forward between."""
    model, example = models.load(f"{name}:tiny")
    ported = xir.port(model)
    with torch.no_grad():
        for _ in range(3):
            ported(**example)
            model(**example)
    assert len(ported.programs) == 1

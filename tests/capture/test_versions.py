"""A change of a dict or of a tensor is told without looking into it, or into what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from xdit_ir.reflection.tensor_types import TensorTypes
from xdit_ir.reflection.versions import Versions


def test_every_dict_that_changed_is_named_until_it_is_accepted() -> None:
    held: list[dict[str, Any]] = [{"a": place} for place in range(4)]
    versions = Versions(held)
    assert not versions.changed()
    held[3]["a"] = 1
    assert versions.changed() == [3]
    held[1]["b"] = held[3].pop("a")
    assert versions.changed() == [1, 3]
    before = versions.accepted
    versions.accept()
    assert versions.accepted != before
    assert not versions.changed()
    held[0].update(a=2)
    assert versions.changed() == [0], "though others were changed later than it was made"


class Own(nn.Parameter):
    pass


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "dtype": lambda weight: setattr(weight, "data", weight.data.double()),
    "shape": lambda weight: setattr(weight, "data", weight.data.reshape(3, 2)),
    "size": lambda weight: setattr(weight, "data", weight.data[:, :2]),
    "strides": lambda weight: setattr(weight, "data", weight.data.t().contiguous().t()),
    "class": lambda weight: setattr(weight, "__class__", Own),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_became_another_is_noticed_and_new_contents_are_not(change: str) -> None:
    weights = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    types = TensorTypes(weights)
    with torch.no_grad():
        weights[0].add_(1)
    weights[1].data = torch.zeros(2, 3)
    assert types.same(weights)
    CHANGES[change](weights[1])
    assert not types.same(weights)
    assert TensorTypes([]).same([])

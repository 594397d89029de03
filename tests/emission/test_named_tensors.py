"""Tensors of a model are found by name wherever a module keeps them, and what takes their place is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdit_ir as xir

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Tables(nn.Module):
    """Keeps tensors in a list, a dict and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.rows = [torch.full((4,), 2.0), torch.full((4,), 3.0)]
        self.named = {"shift": torch.full((4,), 5.0)}
        self.plain = torch.full((4,), 7.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.rows[0] / self.rows[1] + self.named["shift"] * self.plain


@pytest.fixture
def parallel() -> xir.ParallelProgram:
    """Traced before there are weights, so that all tensors are looked up in the model that runs."""
    with torch.device("meta"):
        return xir.trace(Tables(), (torch.empty(2, 4),)).parallelize()


def test_in_lists_dicts_and_attributes(parallel: xir.ParallelProgram) -> None:
    model = Tables()
    assert {"rows.0", "rows.1", "named.shift", "plain", "linear.weight"} <= set(parallel.original.state)
    assert torch.equal(parallel.simulate(model, (X,))[0], model(X))
    emitted = parallel.emit(model)
    assert torch.equal(emitted(X), model(X))
    model.rows[1] = torch.full((4,), 11.0)
    assert torch.equal(emitted(X), model(X)), "tensors are used by reference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model, "rows", list(model.rows)), "replaced"),
        (lambda model: model.rows.pop(), "removed"),
        (lambda model: model.named.clear(), "removed"),
        (lambda model: setattr(model, "linear", nn.Linear(4, 4)), "replaced"),
        (lambda model: setattr(model, "plain", torch.ones(5)), r"plain: the program needs torch.float32\[4\]"),
    ],
)
def test_what_takes_their_place_is_noticed(change, reason: str, parallel: xir.ParallelProgram) -> None:  # type: ignore[no-untyped-def]
    model = Tables()
    emitted = parallel.emit(model)
    change(model)
    with pytest.raises(xir.MismatchError, match=reason):
        emitted(X)


@pytest.mark.parametrize("name", ["rows", "named", "linear", "plain"])
def test_a_missing_one_is_named(name: str, parallel: xir.ParallelProgram) -> None:
    model = Tables()
    delattr(model, name)
    with pytest.raises(xir.MismatchError, match=f"no parameter or buffer '{name}"):
        parallel.emit(model)

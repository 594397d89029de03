"""While it is traced, code finds tensors of the classes that it finds otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from xdit_ir.capture.recorder import Recorder
from xdit_ir.ir.program import Program
from xdit_ir.reflection.fakes import device_of, is_fake

X = torch.randn(2, 8, 4)
ASKED: dict[str, Callable[[torch.Tensor], bool]] = {
    "type is": lambda x: type(x) is torch.Tensor,
    "class": lambda x: x.__class__ is torch.Tensor,
    "in a dict": lambda x: {torch.Tensor: True}.get(type(x), False),
    "name": lambda x: type(x).__name__ == "Tensor",
    "device": lambda x: str(x.device) == "cpu" and not x.is_meta,
}


class Asks(nn.Module):
    """Asks of what class an input, a result, a view, a written tensor, a literal and a buffer are."""

    table: torch.Tensor

    def __init__(self, asked: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.linear, self.asked = nn.Linear(4, 4), asked
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.table
        written = torch.zeros_like(y)
        written[:, :4] = y[:, :4]
        seen = (x, y, y[:, 1:], y.split(2, 1)[0], written, torch.tensor([1.0]), self.table, torch.arange(3))
        if not all(map(self.asked, seen)):
            raise ValueError("not supported")
        return written + y


@pytest.mark.parametrize("asked", ASKED)
def test_tensors_are_plain_to_code_that_asks(asked: str, check: Callable[..., Program]) -> None:
    check(Asks(ASKED[asked]).eval(), (X,), (torch.randn(2, 8, 4),))


def test_a_fake_knows_where_it_pretends_to_be() -> None:
    found = Recorder(torch.device("meta")).blank(X)
    assert is_fake(found) and type(found) is torch.Tensor and device_of(found) == torch.device("cpu")
    assert not is_fake(X) and device_of(X) == X.device

"""Partial evaluation: what may be read is known, what was read is guarded, what may not be read is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xdit_ir.capture import bind_inputs, trace
from xdit_ir.errors import MismatchError, TraceError
from xdit_ir.ir.program import Program

Check = Callable[..., Program]
Run = Callable[..., Any]


class Reads(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.register_buffer("sizes", torch.tensor([1, 2]))

    def forward(self, x: torch.Tensor, n: torch.Tensor, t: Any = None) -> Any:
        return self.function(self.linear(x), n, self)


def pad(x: torch.Tensor, n: torch.Tensor, self: Any) -> Any:
    kept = x[n.bool()]
    starts = F.pad(torch.cumsum(n.sum(1, dtype=torch.int32), 0), (1, 0))
    out = torch.zeros_like(x)
    for index in range(len(n)):
        part = kept[starts[index] : starts[index + 1]]
        out[index, : part.shape[0]] = part.softmax(0)
    return out


def in_place(x: torch.Tensor, n: torch.Tensor, self: Any) -> Any:
    counts = torch.zeros(3, dtype=torch.long)
    counts[1:] = n[0, :2]
    counts += 1
    counts[0].add_(5)
    view = counts[1:]
    view.mul_(2)
    return x[: counts[1]] * int(counts[0]) + int(counts.sum())


def tensor_of_tensors(x: torch.Tensor, n: torch.Tensor, self: Any) -> Any:
    return x * torch.tensor([n.sum(), n.max()])[0] + torch.as_tensor([[1.0, 2.0, 3.0, 4.0]])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "item": lambda x, n, self: x * n.sum().item(),
    "bool": lambda x, n, self: x if (n > 0).any() else -x,
    "int": lambda x, n, self: x[:, : int(n[0, 0])],
    "float": lambda x, n, self: x * float(n.float().mean()),
    "slice": lambda x, n, self: x[:, : n.max()],
    "tolist": lambda x, n, self: x * sum(n.tolist()[0]),
    "numpy": lambda x, n, self: x + torch.from_numpy(np.cumsum(n[:, :1].numpy())).float()[0],
    "array": lambda x, n, self: x * float(np.asarray(n).sum()),
    "iterate": lambda x, n, self: torch.stack([x * int(row.sum()) for row in n]),
    "contains": lambda x, n, self: x * (1 in n),
    "nonzero": lambda x, n, self: x[0][n[0].nonzero()[:, 0]],
    "where": lambda x, n, self: x[torch.where(n > 0)],
    "mask": lambda x, n, self: x[n.bool()],
    "mask and slice": lambda x, n, self: x[n[:, 0].bool(), :2],
    "masked_select": lambda x, n, self: torch.masked_select(x, n.bool()[..., None]),
    "write behind mask": lambda x, n, self: x.clone().masked_fill_(n.bool()[..., None], 2.0),
    "index_put": lambda x, n, self: x.index_put((n.bool(),), torch.tensor(1.0)),
    "set behind mask": lambda x, n, self: _set(x.clone(), n.bool(), 3.0),
    "set many behind mask": lambda x, n, self: _set(x.clone(), n.bool(), x[n.bool()] * 2),
    "repeat_interleave": lambda x, n, self: torch.repeat_interleave(x, n.sum(1), dim=0),
    "unique": lambda x, n, self: x * torch.unique(n).numel(),
    "one_hot": lambda x, n, self: F.one_hot(n).float().sum() * x,
    "split": lambda x, n, self: torch.cat(x.split(n[0].clamp(1, 1).tolist(), dim=1)[::-1]),
    "arange": lambda x, n, self: x[:, :1] * torch.arange(n.sum() + 1),
    "new_zeros": lambda x, n, self: F.pad(x, (0, 0, 0, int(n.sum()))) + x.new_zeros(1).sum(),
    "zeros_like": lambda x, n, self: x * (2 if torch.zeros_like(x).any() else 3),
    "equal": lambda x, n, self: x * (2 if torch.equal(n, n.clone()) else 3),
    "allclose": lambda x, n, self: x * (2 if torch.allclose(n.float(), n.float() + 1) else 3),
    "buffer": lambda x, n, self: x[:, : self.sizes.max()],
    "size": lambda x, n, self: x * torch.tensor(x.shape[1]).item(),
    "random unread": lambda x, n, self: x + 0 * torch.zeros(3, 4),
    "pad": pad,
    "in place": in_place,
    "tensor of tensors": tensor_of_tensors,
    "einsum": lambda x, n, self: torch.einsum("bsd,bs->bd", x, n.float()),
}
UNGUARDED = {"write behind mask", "set behind mask", "index_put", "einsum", "buffer", "size"}
UNGUARDED |= {"random unread", "zeros_like"}


def _set(x: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor:
    x[mask] = value
    return x


N = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_readable(name: str, check: Check) -> None:
    program = check(Reads(FUNCTIONS[name]), (torch.randn(2, 3, 4), N), (torch.randn(2, 3, 4), N.clone()))
    guards = [guard.path for guard in program.signature.guards]
    assert guards == (["@sizes"] if name == "buffer" else [] if name in UNGUARDED else ["n"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_readable_on_meta(name: str, run: Run, same: Callable[[Any, Any], None]) -> None:
    with torch.device("meta"):
        hollow = Reads(FUNCTIONS[name])
    if name == "buffer":
        with pytest.raises(TraceError, match="the model's buffer"):
            trace(hollow, (torch.randn(2, 3, 4, device="meta"), N))
        return
    program = trace(hollow, (torch.randn(2, 3, 4, device="meta"), N))
    model = Reads(FUNCTIONS[name])
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        same(run(program, model, x, N), model(x, N))


def test_literals_on_meta(run: Run, same: Callable[[Any, Any], None]) -> None:
    def literals(x: torch.Tensor, n: torch.Tensor, self: Any) -> Any:
        table = torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)
        return x * table + torch.as_tensor(3, device=x.device) + x.new_tensor([1.5])

    with torch.device("meta"):
        hollow = Reads(literals)
    program = trace(hollow, (torch.randn(2, 3, 4, device="meta"), N))
    model = Reads(literals)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        same(run(program, model, x, N), model(x, N))


def test_a_changed_value_is_a_mismatch(run: Run) -> None:
    model = Reads(FUNCTIONS["mask"])
    x, n = torch.randn(2, 3, 4), N.clone()
    program = trace(model, (x, n))
    run(program, model, x, n)
    n[1, 1] = 1
    with pytest.raises(MismatchError, match=r"^n: .* read while tracing \(test_known\.py:\d+: "):
        run(program, model, x, n)


def test_the_guarded_value_is_a_copy() -> None:
    n = N.clone()
    program = trace(Reads(FUNCTIONS["mask"]), (torch.randn(2, 3, 4), n))
    n.zero_()
    (guard,) = program.signature.guards
    assert torch.equal(guard.value, N)
    assert guard.value.device.type == "cpu" and not guard.value.is_inference()


WAYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda n: n.add_(1),
    "NumPy": lambda n: n.numpy().__iadd__(1),
    "data": lambda n: n.data.add_(1),
}


@pytest.mark.parametrize("way", WAYS)
def test_contents_that_were_read_are_watched(way: str) -> None:
    """Also where PyTorch does not count the write."""
    from xdit_ir.capture import InputBinder

    model = Reads(FUNCTIONS["mask"])
    x, n = torch.randn(2, 3, 4), N.clone()
    binder = InputBinder(model, trace(model, (x, n)))
    binder((x, n), {})
    WAYS[way](n)
    with pytest.raises(MismatchError, match="n: its contents were read"):
        binder((x, n), {})


def test_unread_integers_are_inputs(check: Check) -> None:
    model = Reads(lambda x, n, self: x * n[..., None])
    program = check(model, (torch.randn(2, 3, 4), N), (torch.randn(2, 3, 4), N + 5))
    assert not program.signature.guards


def test_literals_are_guarded(check: Check, run: Run) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, mode: str, flags: Any = (True, None)) -> Any:
            return x * 2 if mode == "double" else x

    x = torch.randn(2)
    program = check(Model(), {"x": x, "mode": "double", "flags": [True, None]})
    with pytest.raises(MismatchError, match=r"^mode: expected 'double', got 'single'"):
        bind_inputs(Model(), program, (x, "single", [True, None]), {})
    with pytest.raises(MismatchError, match=r"^flags\[0\]: expected True, got 1"):
        bind_inputs(Model(), program, (x, "double", [1, None]), {})


@pytest.mark.parametrize(
    ("function", "culprit"),
    [
        (lambda x, n, self: x * x.max().item(), "item.* depends on input 'x', the model's parameters"),
        (lambda x, n, self: x if (x * self.linear.bias).sum() > 0 else -x, "depends on input 'x', the model's param"),
        (lambda x, n, self: x[x > 0], "a boolean index .* depends on"),
        (lambda x, n, self: x.tolist(), r"tolist\(\)"),
        (lambda x, n, self: x * torch.rand(()).item(), "depends on random numbers"),
        (lambda x, n, self: x.nonzero(), "nonzero"),
        (lambda x, n, self: np.asarray(x), "__array__"),
    ],
)
def test_unreadable(function: Callable[..., Any], culprit: str) -> None:
    with pytest.raises(TraceError, match=f"test_known.py:.*{culprit}"):
        trace(Reads(function), (torch.randn(2, 3, 4), N))


def test_what_is_read_of_parameters_is_guarded() -> None:
    model = Reads(lambda x, n, self: x if self.linear.bias.sum() > 0 else -x)
    program = trace(model, (torch.randn(2, 3, 4), N))
    assert [guard.path for guard in program.signature.guards] == ["@linear.bias"]
    with torch.no_grad():
        model.linear.bias.neg_()
    with pytest.raises(MismatchError, match=r"^linear.bias: it was read while tracing"):
        bind_inputs(model, program, (torch.randn(2, 3, 4), N), {})


def test_what_is_read_of_a_timestep_is_guarded(run: Run) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> Any:
            return x * 2 if timestep[0] > 500 else x

    x = torch.randn(2)
    program = trace(Model(), (x, torch.tensor([999.0])))
    assert torch.equal(run(program, Model(), x, torch.tensor([501.0])), x * 2)
    with pytest.raises(MismatchError, match=r"^timestep: what was read"):
        run(program, Model(), x, torch.tensor([499.0]))
    with pytest.raises(TraceError, match="depends on input 'timestep'"):
        trace(Model(), (x, torch.zeros(1, device="meta")))
    with pytest.raises(TraceError, match=r"input 'timestep'.*pass a small real tensor"):
        trace(Model(), (torch.randn(2), torch.zeros(1, dtype=torch.long, device="meta")))


def test_float_coordinates_may_be_read(check: Check) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
            return x[: int(ids[:, 1].max()) + 1]

    program = check(Model(), (torch.randn(9), torch.tensor([[0.0, 1.0], [0.0, 2.0]])))
    assert [guard.path for guard in program.signature.guards] == ["ids"]

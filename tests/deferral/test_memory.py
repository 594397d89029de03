"""Whoever asks a result that is not there yet for its memory gets that of the whole result, or an error; and what else
was made of the result does not change when that memory is written to."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from xdit_ir.deferral.deferred import Deferred, pending
from xdit_ir.errors import XditError

SHAPE = (2, 6, 8)


@pytest.fixture
def value() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


class Source:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def part(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.value.narrow(dim, start, stop - start)

    def whole(self) -> torch.Tensor:
        return self.value


def deferred(value: torch.Tensor) -> Any:
    return pending(Source(value), value.shape, value.dtype, value.device) * 1.0


def floats(address: int) -> torch.Tensor:
    memory = (ctypes.c_char * (4 * 2 * 6 * 8)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).reshape(SHAPE).clone()


def of_bytes(storage: Any) -> torch.Tensor:
    return torch.tensor(list(storage), dtype=torch.uint8).view(torch.float32).reshape(SHAPE)


def saved(x: torch.Tensor) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


WAYS: dict[str, Callable[[Any], Any]] = {
    "from_dlpack": lambda x: torch.from_dlpack(x).clone(),
    "numpy from_dlpack": lambda x: torch.tensor(np.from_dlpack(x)),
    "numpy": lambda x: torch.tensor(x.numpy()),
    "Tensor.numpy": lambda x: torch.tensor(torch.Tensor.numpy(x)),
    "Tensor.tolist": lambda x: torch.tensor(torch.Tensor.tolist(x)),
    "asarray": lambda x: torch.tensor(np.asarray(x)),
    "share_memory_": lambda x: x.share_memory_().clone(),
    "untyped_storage": lambda x: of_bytes(x.untyped_storage()),
    "storage": lambda x: torch.tensor(x.storage().tolist()).reshape(SHAPE),
    "data_ptr": lambda x: floats(x.data_ptr()),
    "Tensor.data_ptr": lambda x: floats(torch.Tensor.data_ptr(x)),
    "safetensors": lambda x: safetensors.torch.load(safetensors.torch.save({"x": x}))["x"],
    "torch.save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "set_": lambda x: torch.empty(0).set_(x),
    "as_strided": lambda x: x.as_strided(SHAPE, (48, 8, 1)),
    "swap_tensors": lambda x: [y := torch.zeros(SHAPE), torch.utils.swap_tensors(y, x)][0],
    "format": lambda x: torch.tensor([float(f"{one:.9f}") for one in x.flatten()]).reshape(SHAPE),
}


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("name", WAYS)
def test_whoever_asks_for_memory_gets_that_of_the_result(name: str, value: torch.Tensor) -> None:
    got = WAYS[name](deferred(value))
    torch.testing.assert_close(torch.tensor(got.tolist()), value, rtol=0, atol=1e-7 if name == "format" else 0)


def test_what_asks_below_python_is_refused(value: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(deferred(value))


@pytest.mark.parametrize(
    "way", [lambda x: x.numpy(), lambda x: torch.from_dlpack(x), lambda x: x.as_strided((96,), (1,))]
)
def test_memory_is_shared_from_then_on(way: Callable[[Any], Any], value: torch.Tensor) -> None:
    x = deferred(value)
    before, view, memory = x * 2, x[0], way(x)
    x.add_(1)
    view.mul_(3)
    assert np.allclose(np.asarray(memory).reshape(SHAPE), np.asarray(x))
    memory[...] = 7
    assert x.tolist() == torch.full(SHAPE, 7.0).tolist() and view.tolist() == torch.full(SHAPE[1:], 7.0).tolist()
    torch.testing.assert_close(before + 0, value * 2)


def test_an_operator_with_out_writes_to_it_alone(value: torch.Tensor) -> None:
    x = deferred(value)
    before = x * 2
    assert torch.mul(value, 5, out=x) is x
    assert torch.equal(x + 0, value * 5) and torch.equal(before + 0, value * 2)


def test_so_does_an_operator_on_a_list(value: torch.Tensor) -> None:
    x = deferred(value)
    before = x * 2
    torch._foreach_mul_([x], 5.0)
    assert torch.equal(x + 0, value * 5) and torch.equal(before + 0, value * 2)


def test_so_does_a_collective(value: torch.Tensor, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = deferred(value)
        before, alone = x * 2, [torch.zeros(SHAPE)]
        dist.all_reduce(x)
        dist.all_gather(alone, x)
        x.add_(1)
        assert torch.equal(alone[0], value) and torch.equal(before + 0, value * 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("change", [lambda x: x.unsqueeze_(0), lambda x: x.resize_(3), lambda x: x.t_()])
def test_a_change_of_shape_in_place_is_refused(change: Callable[[Any], Any], value: torch.Tensor) -> None:
    x = deferred(value)[0]
    with pytest.raises(XditError, match="cannot change the shape"):
        change(x)
    assert isinstance(x, Deferred) and torch.equal(x + 0, value[0])

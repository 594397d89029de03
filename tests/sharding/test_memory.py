"""Memory is told in advance: by hand for a small model, and against what is counted while real ones run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import Layer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.ir import ops
from xdit_ir.ir.window_ops import padded_conv
from xdit_ir.planning.estimate import estimate
from xdit_ir.planning.hardware import load
from xdit_ir.sharding.memory import Memory

LAYERS, WIDTH = 3, 16
X = torch.zeros(2, 12, WIDTH)
VALUE = X.nbytes
EMBED, LAYER = 4 * (WIDTH * WIDTH + WIDTH), 4 * (4 * WIDTH * WIDTH + 4 * WIDTH)
PACKED_EMBED, PACKED_LAYER = 1280, 4608  # each weight from a multiple of 256 on
WHOLE = 2 * EMBED + LAYERS * LAYER


@pytest.fixture(scope="module")
def traced() -> TracedProgram:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Layer(WIDTH) for _ in range(LAYERS)), nn.Linear(WIDTH, WIDTH))
    return xir.trace(model.eval(), (X,))


def test_one_device(traced: TracedProgram) -> None:
    """Beside the input and what a layer is given there are its queries, keys, values and the attention of these; a
    recording keeps copies of the input and of the result."""
    [found] = traced.parallelize().report().memory
    assert found == Memory(weights=WHOLE, activations=VALUE + VALUE + 4 * VALUE, recordings=2 * VALUE)
    assert found.total == WHOLE + 8 * VALUE


def test_exchanges_of_heads(traced: TracedProgram) -> None:
    """Of half of the tokens: queries, keys and values are there twice until all of them are sent; as much as that is
    put together to be sent. The result is gathered."""
    half = VALUE // 2
    wanted = Memory(WHOLE, activations=VALUE + half + 6 * half, exchanges=3 * half, recordings=2 * VALUE)
    assert traced.parallelize(ulysses=2).report().memory == [wanted, wanted]


def test_a_ring(traced: TracedProgram) -> None:
    """Keys and values leave and arrive, and two partial results are joined."""
    half = VALUE // 2
    wanted = Memory(WHOLE, activations=VALUE + half + 4 * half, exchanges=4 * half + 2 * half, recordings=2 * VALUE)
    assert traced.parallelize(ring=2).report().memory == [wanted, wanted]


def test_weights_that_are_brought_count_for_the_moment(traced: TracedProgram) -> None:
    """Two layers at a time; over two ranks each has the halves of all, in units of 512 bytes. What is uploaded to be
    gathered is there until that is awaited: halves of both layers, and of the one that is on its way from the host."""
    half = (LAYERS * PACKED_LAYER + 2 * -(-PACKED_EMBED // 512) * 512) // 2
    for options, weights, host in (
        ({"ulysses": 2, "shard_weights": True}, half + 2 * PACKED_LAYER, 0),
        ({"ulysses": 2, "stream_weights": True}, 2 * PACKED_LAYER + 3 * PACKED_LAYER // 2, half),
        ({"stream_weights": True}, 2 * PACKED_LAYER, LAYERS * PACKED_LAYER + 2 * PACKED_EMBED),
    ):
        for found in traced.parallelize(**options).report().memory:
            assert (found.weights, found.host) == (weights, host)


def test_stages(traced: TracedProgram) -> None:
    """Each has its own weights and buffers; both are in the report already."""
    report = traced.parallelize(pipefusion=2).report()
    assert [one.weights for one in report.memory] == report.weight_bytes_per_rank
    assert [one.buffers for one in report.memory] == report.buffer_bytes_per_rank
    assert sum(report.weight_bytes_per_rank) == WHOLE and min(report.buffer_bytes_per_rank) > 0
    assert all(one.activations < VALUE + 7 * VALUE for one in report.memory)


def test_the_report_and_a_plan_say_it(traced: TracedProgram) -> None:
    report = traced.parallelize(ulysses=2, stream_weights=True).report()
    [line] = [line for line in str(report).splitlines() if "the fullest rank needs" in line]
    assert f"{report.memory[0].total / 2**20:.1f} MiB of a GPU (weights " in line and "of the host" in line
    planned = estimate(traced.parallelize(ulysses=2), load("h100"))
    told = traced.parallelize(ulysses=2).report().memory
    assert planned.gib == tuple(one.total / 2**30 for one in told)


class Counted(TorchDispatchMode):
    """Bytes that operators have made and that are still there; `most` of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ({s._cdata: s for s in map(_storage, _tensors(one))} for one in ((args, kwargs), result))
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        for key in made.keys() - given.keys() - self._alive.keys():
            self._alive[key] = StorageWeakRef(made[key]), made[key].nbytes()
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _storage(x: torch.Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


@pytest.mark.parametrize("name", ["flux.1-dev", "wan2.1-t2v-1.3b"])
def test_activations_are_what_is_counted(name: str) -> None:
    """While a port runs, operator by operator."""
    model, example = models.load(f"{name}:tiny")
    port = xir.port(model, ulysses=1)
    with torch.no_grad():
        port(**example)
        with Counted() as counted:
            port(**example)
    inputs = sum(x.nbytes for x in _tensors(example))
    assert port.report().memory[0].activations - inputs == pytest.approx(counted.most, rel=0.01)


def test_a_convolution_at_the_border_copies_no_operand() -> None:
    """Which the report does not count: the rank with the last row pads behind only."""
    x, weight = torch.randn(1, 8, 64, 32), torch.randn(8, 8, 3, 3)
    with torch.no_grad(), Counted() as counted:
        result = padded_conv(x, weight, None, (1, 1), ((0, 1), (1, 1)), (1, 1), 1)
    assert torch.allclose(result, torch.conv2d(torch.nn.functional.pad(x, (1, 1, 0, 1)), weight), atol=1e-5)
    assert counted.most <= 1.05 * result.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_over_parts_makes_its_result_only(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 4, 64, 32).to(dtype)
    with torch.no_grad(), Counted() as counted:
        moments = ops.moments(x, x[0, 0].numel())
        assert counted.most <= 0.55 * x.nbytes  # of half precision a quarter at a time, in single precision
        result = ops.normalize(x, moments, torch.ones(8, 4), torch.zeros(8, 4), 1e-5)
    assert counted.most <= 1.05 * x.nbytes
    assert torch.allclose(result.float(), torch.group_norm(x.float().flatten(1, 2), 8).view_as(x), atol=2e-2)

"""Weights in equal parts over the ranks: every rank's output is the model's, and it holds its share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loaded import load
from stacks import Stack, X
from test_simulated import MODELS
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.ir import ops
from xdit_ir.ir.program import SPEC, call_parts, is_block_call
from xdit_ir.sharding.gathered_weights import gathers_weights

DEGREES = ({"ulysses": 2}, {"cfg": 2}, {"ulysses": 2, "ring": 2})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A set of degrees for each of some models, another one for the next; all for every model with `--zoo-all`."""
    if "degrees" in metafunc.fixturenames:
        if metafunc.config.getoption("--zoo-all"):
            pairs = [(name, degrees) for name in models.names() for degrees in DEGREES]
        else:
            pairs = [
                (name, degrees)
                for m, name in enumerate(MODELS)
                for d, degrees in enumerate(DEGREES)
                if (m + d) % 3 == 0
            ]
        names = [f"{name}-{'-'.join(degrees)}" for name, degrees in pairs]
        metafunc.parametrize(("name", "degrees"), pairs, ids=names)


def test_every_rank_gives_the_models_output_with_its_part_of_the_weights(name: str, degrees: dict[str, int]) -> None:
    case = load(name)
    traced = case.traced
    try:
        parallel = traced.parallelize(**degrees, shard_weights=True)
    except xir.ParallelizeError as error:
        assert "divides the batch" in str(error)
        pytest.skip(str(error))
    case.assert_equal(parallel)
    report, block = parallel.report(), _largest_block(traced)
    assert name not in MODELS or report.fallbacks == []
    padding = 256 * (len(traced.ir.state) + parallel.world_size)
    part = report.weight_bytes_total // parallel.world_size + padding
    assert max(report.weight_bytes_per_rank) <= part
    if block:
        assert max(one.weights for one in report.memory) <= part + 2 * (block + padding)


def _largest_block(traced: TracedProgram) -> int:
    """Bytes of the weights of the call that has most; what stands around calls is brought in pieces of as much, unless
    one weight alone has more."""
    sizes = [sum(one.meta[SPEC].nbytes for one in call_parts(call).weights.values()) for call in traced.analysed.calls]
    outside = [spec.nbytes for spec in traced.ir.state.values()]
    return max(*sizes, *outside) if sizes else 0


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


def test_two_blocks_are_whole_at_a_time(model: nn.Module) -> None:
    parallel = xir.trace(model, (X,)).parallelize(ulysses=2, shard_weights=True)
    report, layer = parallel.report(), 4 * (4 * 16 * 16 + 4 * 16)
    assert report.gathered.most <= 2 * (layer + 512)
    assert report.gathered.total >= sum(x.nbytes for x in model.parameters())
    assert "ranks hold parts of weights" in str(report)
    assert {one.kind: one.count for one in report.collectives}["gather of weights"] == 6 + 2
    order = [node for node in parallel.ir.graph.nodes if is_block_call(node) or gathers_weights(node)]
    calls = [at for at, node in enumerate(order) if is_block_call(node)]
    assert all(sum(map(gathers_weights, order[:at])) == 3 + place for place, at in enumerate(calls[:-1])), (
        "each block's weights are on their way while the one before computes"
    )


def test_what_is_stored_already_serves_a_program_that_would_store_otherwise(model: nn.Module) -> None:
    """When nobody has all of a weight any more, other inputs must make do with the parts that there are."""
    before = xir.trace(model, (X, True)).parallelize(ulysses=2, shard_weights=True)
    joined = xir.trace(model, (X,)).ir
    later = TracedProgram(joined, stored=before.ir.stored).parallelize(ulysses=2, shard_weights=True)
    assert before.ir.stored.items() <= later.ir.stored.items()
    assert len(later.ir.stored) == len(before.ir.stored) + 1, "the first layer, which was skipped"
    for output in later.simulate(model, (X,)):
        torch.testing.assert_close(output, model(X))


@pytest.mark.parametrize(
    ("division", "along", "parts"),
    [
        ({"ulysses": 2, "ring": 2}, "ring", 2),
        ({"ulysses": 2, "ring": 2}, ("ring", "ulysses"), 4),
        ({"cfg": 2, "ulysses": 2}, "cfg", 2),
        ({"pipefusion": 2, "ulysses": 2, "ring": 2}, "ulysses", 4),
        ({"ulysses": 2, "ring": 2, "stream_weights": True}, "ulysses", 2),
    ],
    ids=str,
)
def test_only_ranks_that_differ_along_named_mesh_dims_have_parts(
    model: nn.Module, division: dict[str, Any], along: Any, parts: int
) -> None:
    """As many, of stages too; the others have the same, and gather from those of their own group."""
    parallel = xir.trace(model, (X,)).parallelize(**division, shard_weights=along)
    outputs = parallel.simulate_steps(model, [(X,)])[0] if "pipefusion" in division else parallel.simulate(model, (X,))
    for output in outputs:
        torch.testing.assert_close(output, model(X))
    padding = 256 * (len(xir.trace(model, (X,)).ir.state) + 4)
    report = parallel.report()
    assert report.weight_bytes_total / parts <= max(report.weight_bytes_per_rank) + padding
    assert max(report.weight_bytes_per_rank) <= report.weight_bytes_total / parts + padding


@pytest.mark.parametrize(
    ("along", "said"),
    [
        ("ulyses", "did you mean 'ulysses'"),
        ("pipefusion", "stages have weights of their own"),
        (3, "expected True or False, or mesh dims"),
        ((), "expected True or False, or mesh dims"),
        ("ring+cfg", "no two ranks that run the same call differ along it, with ulysses=2; nearest legal: .*'ulysses'"),
    ],
    ids=str,
)
def test_mesh_dims_that_divide_no_weights_are_refused(model: nn.Module, along: Any, said: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=said):
        xir.trace(model, (X,)).parallelize(ulysses=2, shard_weights=along)
    if along == "ring+cfg":
        with pytest.raises(xir.ParallelizeError, match="names mesh dims, whose degrees are left to be planned"):
            xir.port(model, shard_weights=along)


def test_check_takes_it(model: nn.Module) -> None:
    assert xir.check(model, (X,), ulysses=3, shard_weights=True).ok


def test_bits_and_scalars_of_every_type_travel() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.short = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(3).bfloat16())
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("turn", torch.randn(5, dtype=torch.complex64))
            self.register_buffer("none", torch.zeros(0))
            self.turned = nn.Parameter(torch.randn(3, 5).t())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (x[..., None] * self.scale).expand(*x.shape, 3) * self.short.float() * self.mask
            return (y @ self.turned.t() * self.turn.real).sum(-1) + self.none.sum()

    torch.manual_seed(0)
    odd, x = Odd().eval(), torch.randn(2, 12)
    for output in xir.trace(odd, (x,)).parallelize(cfg=2, shard_weights=True).simulate(odd, (x,)):
        torch.testing.assert_close(output, odd(x))


@pytest.mark.parametrize(
    ("division", "keeping"),
    [
        ({"pipefusion": 2, "ulysses": 2}, {"shard_weights": True}),
        ({"pipefusion": 2, "cfg": 2, "patches": 3}, {"shard_weights": True}),
        ({"pipefusion": 2, "ring": 2}, {"stream_weights": True}),
        ({"pipefusion": 2, "stages": (1, 2, 2, 1)}, {"stream_weights": "8KiB"}),
    ],
    ids=str,
)
def test_stages_divide_what_they_have(model: nn.Module, division: dict[str, Any], keeping: dict[str, Any]) -> None:
    """Each over the ranks that compute it; what steps give is what they give with whole weights."""
    steps, traced = [(X * (1 + step),) for step in range(3)], xir.trace(model, (X,))
    whole, parts = (traced.parallelize(**division, **more) for more in ({}, keeping))
    torch.testing.assert_close(parts.simulate_steps(model, steps), whole.simulate_steps(model, steps))
    report, copies = parts.report(), parts.world_size // 2
    held = [size / copies for size in whole.report().weight_bytes_per_rank]
    assert all(got <= each + 9 * 256 for got, each in zip(report.weight_bytes_per_rank, held, strict=True))
    streams = "stream_weights" in keeping
    assert report.gathered.most <= 2 * 4608 + streams * 3 * 4608 // 2
    assert bool(report.gathered.uploaded) == streams and all(bool(one.host) == streams for one in report.memory)
    for rank in range(parts.world_size):
        names = parts.pipeline.weights_of(rank)
        assert names and {*names} == {*parts.pipeline.stored_of(rank)}


def test_what_cannot_be_divided_is_refused(model: nn.Module) -> None:
    traced = xir.trace(model, (X,))
    with pytest.raises(xir.ParallelizeError, match=r"shard_weights=True with pipefusion=2 alone.*nearest legal"):
        traced.parallelize(pipefusion=2, shard_weights=True)
    with pytest.raises(xir.ParallelizeError, match=r"shard_weights='all': expected True or False"):
        traced.parallelize(ulysses=2, shard_weights="all")  # type: ignore[arg-type]
    with pytest.raises(xir.ParallelizeError, match=r"shard_weights=True with pipefusion=2"):
        xir.port(model, pipefusion=2, shard_weights=True)
    with pytest.raises(xir.ParallelizeError, match=r"shard_weights=True with cfg=2.*use ulysses=2"):
        traced.parallelize(cfg=2, pair_calls=True, shard_weights=True)
    assert not traced.parallelize(shard_weights=True).ir.stored, "one rank has all"


@pytest.mark.parametrize("options", [{"shard_weights": True}, {"stream_weights": True}, {"stream_weights": "2KiB"}])
def test_weights_that_are_gathered_are_no_fallbacks(options: dict[str, Any], model: nn.Module) -> None:
    assert xir.trace(model, (X,)).parallelize(ulysses=2, **options).report().fallbacks == []


def test_halves_that_run_different_calls_share_nothing(model: nn.Module) -> None:
    parallel = xir.trace(model, (X,)).parallelize(cfg=2, ulysses=2, pair_calls=True, shard_weights=True)
    gathers = [one.mesh_dim for one in parallel.report().collectives if one.kind == "gather of weights"]
    assert gathers == ["ulysses"]
    assert not any(node.target is ops.unpack for block in parallel.ir.blocks.values() for node in block.graph.nodes)

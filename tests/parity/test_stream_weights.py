"""Weights in the host's memory: outputs are the model's, and two blocks at most are on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from stacks import Stack, X
from test_simulated import MODELS
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import xdit_ir as xir
from xdit_ir import Machine, models
from xdit_ir.ir import ops
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.ir.program import is_block_call
from xdit_ir.sharding.gathered_weights import gathers_weights
from xdit_ir.sharding.verify import verify
from xdit_ir.text import equal, parse, write
from xdit_ir.transport.uploads import StartUpload

LAYER = 4 * (4 * 16 * 16 + 4 * 16)  # bytes of one layer of `Stack`
PADDING = 4 * 256
PACKED = 4608  # bytes of one, each weight from a multiple of 256 on
ALL = {"stream_weights": True}
DEGREES = ({**ALL}, {}, {"ulysses": 2}, {"tensor": 2, "ulysses": 2}, {"ulysses": 2, **ALL})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One model alone, a half of which stays; all models, also over ranks, with `--zoo-all`."""
    if "degrees" in metafunc.fixturenames:
        every = metafunc.config.getoption("--zoo-all")
        pairs = (
            [(name, degrees) for name in MODELS for degrees in DEGREES]
            if every
            else [("flux.1-dev", one) for one in DEGREES[1:2]]
        )
        metafunc.parametrize(("name", "degrees"), pairs, ids=[f"{name}-{'-'.join(d)}" for name, d in pairs])


def test_every_rank_gives_the_models_output(name: str, degrees: dict[str, Any]) -> None:
    model, example = models.load(f"{name}:tiny")
    half = sum(x.nbytes for x in model.parameters()) // 2
    parallel = xir.trace(model, example).parallelize(**{"stream_weights": half, **degrees})
    with torch.no_grad():
        want = tensors_of(model(**example))
    for rank, output in enumerate(parallel.simulate(model, example)):
        assert relative_error(tensors_of(output), want) <= 1e-5, f"rank {rank}"
    held = [str(node.target) for node in parallel.ir.graph.find_nodes(op="get_attr")]
    assert not [name for name in held if name in parallel.ir.state and parallel.ir.state[name].nbytes]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Stack(8).eval()


@pytest.fixture
def most_on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes of uploads that were there at a time."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most, start = [0], StartUpload.forward

    def forward(self: StartUpload, x: torch.Tensor) -> Any:
        copy, there = start(self, x)
        alive[:] = [one for one in alive if not one[0].expired()]
        alive.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        most[0] = max(most[0], sum(size for _, size in alive))
        return copy, there

    monkeypatch.setattr(StartUpload, "forward", forward)
    return lambda: most[0]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_port_uploads_block_by_block(
    request: pytest.FixtureRequest, model: nn.Module, most_on_device: Callable[[], int], mode: str
) -> None:
    """For two kinds of inputs; the model has nothing left, and what it is loaded with later would have no effect."""
    if mode == "compiled" and not request.config.getoption("--large"):
        pytest.skip("compiles for half a minute (--large)")
    with torch.no_grad():
        want = model(X), model(X, True)
        port = xir.port(model, stream_weights=True, mode=mode)
        for _ in range(2):
            torch.testing.assert_close((port(X), port(X, True)), want)
    assert LAYER < most_on_device() <= 2 * (LAYER + PADDING)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(xir.MismatchError, match=r"stream_weights=True"):
        port.load_state_dict(Stack(8).state_dict())


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_stays_and_what_streams_alternate(model: nn.Module, ranks: int) -> None:
    """Half of eight layers and of two projections; uploads begin when the last one is used, or is to be gathered."""
    room = 4 * PACKED + 2 * 1280
    parallel = xir.trace(model, (X,)).parallelize(ulysses=ranks, stream_weights=room // ranks)
    program, report = parallel.ir, parallel.report()
    stays = [not program.stored[f"_stored.layers.{layer}"].on_host for layer in range(8)]
    assert sum(stays) == 4 and not any(a == b == c for a, b, c in zip(stays, stays[1:], stays[2:], strict=False))
    assert report.gathered.uploaded == 4 * PACKED // ranks
    assert report.memory[0].host == 4 * PACKED // ranks
    assert report.memory[0].weights <= room // ranks + 3 * PACKED
    nodes = list(program.graph.nodes)
    calls = [at for at, node in enumerate(nodes) if is_block_call(node)]
    streamed = [layer for layer, stay in enumerate(stays) if not stay]
    begun = {node.name: at for at, node in enumerate(nodes)}
    for before, layer in itertools.pairwise(streamed):
        first = before - (ranks > 1)
        assert (calls[first - 1] if first else 0) < begun[f"_stored_layers_{layer}_upload"] < calls[first]
    for output in parallel.simulate(model, (X,)):
        torch.testing.assert_close(output, model(X))


def test_a_port_keeps_to_what_stays(model: nn.Module, most_on_device: Callable[[], int]) -> None:
    """Also for inputs that come later, which would choose otherwise; as much as all are is all of them."""
    want = model(X), model(X, True)
    port = xir.port(model, stream_weights="8KiB")
    torch.testing.assert_close((port(X), port(X, True)), want)
    assert LAYER < most_on_device() <= 2 * (LAYER + PADDING)
    assert not xir.trace(Stack(8), (X,)).parallelize(stream_weights="1 GiB").report().gathered.uploaded


def test_uploads_begin_before_the_call_before(model: nn.Module) -> None:
    """With several ranks each uploads its part one call earlier still, and the parts are gathered."""
    traced = xir.trace(model, (X,))
    for degrees, upload, gather in (({}, 1, None), ({"ulysses": 2}, 2, 1)):
        nodes = list(traced.parallelize(**degrees, stream_weights=True).ir.graph.nodes)
        calls = [at for at, node in enumerate(nodes) if is_block_call(node)]
        places = {f"_stored_layers_{layer}_upload": layer for layer in range(3, 8)}
        begun = {node.name: at for at, node in enumerate(nodes)}
        for name, layer in places.items():
            assert calls[layer - upload - 1] < begun[name] < calls[layer - upload]
            if gather:
                assert calls[layer - gather - 1] < begun[f"{name}_gather"] < calls[layer - gather]


@pytest.mark.parametrize("a_layer_takes", [1.0, 1e6], ids=["fast", "slow"])
def test_the_report_says_what_is_hidden(model: nn.Module, a_layer_takes: float) -> None:
    """Worked out by hand for a machine that does one FLOP a second, of which only products and attention have any: the
    first upload has nothing to hide it, and the last unit has none to hide."""
    layer, embed = 2 * 24 * 16 * 64 + 4 * 2 * 2 * 12 * 12 * 8, 2 * 24 * 16 * 16
    packed, first = 1024 * 4 + 2 * 256, 1024 + 256  # bytes of a layer and of the projections around all
    machine = Machine(flops=1.0, memory=1e15, upload=packed / a_layer_takes)
    report = xir.trace(model, (X,)).parallelize(stream_weights=True, machine=machine).report()
    found, shortest = report.gathered, first / packed * a_layer_takes
    assert found.uploaded == 8 * packed + 2 * first and found.most == 2 * packed
    assert found.seconds == pytest.approx(8 * a_layer_takes + 2 * shortest)
    exposed = shortest if a_layer_takes < embed else found.seconds - 8 * layer - embed
    assert found.exposed == pytest.approx(exposed)
    assert f"of which {(found.seconds - exposed) * 1e3:.1f} are hidden" in str(report)
    if a_layer_takes < embed:
        assert not found.excess and "would have to stay" not in str(report)
        return
    assert found.excess == pytest.approx(found.uploaded - (8 * layer + 2 * embed) * machine.upload, abs=1)
    told = xir.trace(model, (X,)).parallelize(stream_weights=found.excess + packed, machine=machine).report().gathered
    assert told.exposed <= 0.05 * (8 * layer + 2 * embed), "as much is what it takes"


def test_its_text_reads_back_and_a_wrong_one_is_caught(model: nn.Module) -> None:
    program = xir.trace(model, (X,)).parallelize(ulysses=2, stream_weights=True).ir
    assert equal(parse(write(program).text), program)
    name, stored = next(iter(program.stored.items()))
    wrong = program.replace(stored={**program.stored, name: replace(stored, on_host=False)})
    with pytest.raises(xir.VerifyError, match="if and only if it lies in the host's memory"):
        verify(wrong)


def test_halves_that_run_different_calls_upload_all(model: nn.Module) -> None:
    parallel = xir.trace(model, (X,)).parallelize(cfg=2, pair_calls=True, stream_weights=True)
    assert not any(map(gathers_weights, parallel.ir.graph.nodes))
    assert any(node.target is ops.upload for node in parallel.ir.graph.nodes)


def test_check_takes_it(model: nn.Module) -> None:
    assert xir.check(model, (X,), ulysses=2, stream_weights="8KiB").ok
    with pytest.raises(xir.ParallelizeError, match=r"stream_weights='yes': expected True or False, or how much"):
        xir.port(model, stream_weights="yes")

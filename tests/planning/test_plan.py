"""A plan holds every way to use some GPUs, the best first, and says why not the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir.ir.mesh import MESH_DIMS
from xdit_ir.planning.hardware import load
from xdit_ir.planning.plan import Plan
from xdit_ir.porting import planned


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, width: int = 2048, heads: int = 16, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model(**sizes: int) -> nn.Module:
    with torch.device("meta"):
        return Layers(**sizes).to(torch.bfloat16)


def example(batch: int = 1, tokens: int = 4096, width: int = 2048) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(batch, tokens, width, dtype=torch.bfloat16, device="meta")}


@pytest.fixture(scope="module")
def of_eight() -> Plan:
    return xir.plan(model(), example(batch=2), gpus=8, exact=False)


def test_every_set_of_degrees_is_there_once(of_eight: Plan) -> None:
    named = [one.name for one in of_eight.candidates]
    assert len(named) == len(set(named))
    assert {"u8", "r8", "r2u4", "r4u2", "c2u4", "c2r2u2", "c2r4", "p8m8", "p8m16", "p2u4m2", "c2p2u2m4"} <= set(named)
    assert {"t8", "u4t2", "c2t4", "u8 sharded", "c2t4 sharded", "8 x u1"} <= set(named)
    assert all(one.data * one.degrees.ranks == 8 for one in of_eight.candidates)


def test_the_best_is_first_and_the_others_say_why_not(of_eight: Plan) -> None:
    first, *others = of_eight.candidates
    assert not first.why and all(one.why for one in others)
    assert first.parts is not None and first.ms is not None
    single = [one for one in of_eight.candidates if one.data == 1]
    worked = [one.ms for one in single if one.parts is not None and one.ms is not None]
    assert worked == sorted(worked) and len(worked) == 3
    assert len(first.gib) == len(first.weights) == 8 and max(first.gib) > max(first.weights) > 0
    illegal = [one.legal for one in of_eight.candidates]
    assert illegal == sorted(illegal, reverse=True), "illegal ones last"
    assert any("cfg=4 divides the batch, but the example has a batch of 2" in one.why for one in others)


def test_the_best_is_what_port_and_parallelize_take(of_eight: Plan) -> None:
    assert xir.trace(model(), example(batch=2)).parallelize(**of_eight.best).world_size == 8


def test_on_several_hosts_tokens_are_exchanged_for_heads_inside_them_only() -> None:
    wide, long = model(width=3072, heads=24, count=2), example(width=3072)
    together = xir.plan(wide, long, gpus=4, machine=load("h100"), tensor=1)
    apart = xir.plan(wide, long, gpus=4, machine=load("h100").on_hosts(2), tensor=1)
    assert [str(one.candidates[0].degrees) for one in (together, apart)] == ["u4", "r2u2"]
    assert apart.machine == "h100 in hosts of 2"


def test_only_exact_ways_unless_others_are_allowed(of_eight: Plan) -> None:
    assert not all(one.exact for one in of_eight.candidates)
    assert all(one.exact for one in xir.plan(model(), example(), gpus=2).candidates)


def test_degrees_that_are_given_are_kept() -> None:
    made = xir.plan(model(), example(), gpus=4, ulysses=2)
    assert {one.name for one in made.candidates if one.legal and one.data == 1 and not one.shard_weights} == {
        "r2u2",
        "u2t2",
    }
    assert {one.name for one in made.candidates if one.data > 1} == {"2 x u2"}
    assert made.best == {**dict.fromkeys(MESH_DIMS, 1), "ring": 2, "ulysses": 2}
    staged = xir.plan(model(), example(), gpus=2, pipefusion=2).candidates
    assert {one.name for one in staged} == {"p2m2", "p2m4"}


def test_what_does_not_fit_says_what_it_needs() -> None:
    tight = xir.plan(model(), example(), gpus=2, memory=0.05, exact=False)
    assert all("GiB a GPU" in one.why and "0.1 may be used" in one.why for one in tight.candidates if one.legal)
    with pytest.raises(xir.ParallelizeError, match=r"no way to use 2 GPUs .* needs the least, .* use more GPUs"):
        _ = tight.best
    few = example(tokens=1024)
    whole = max(xir.plan(model(), few, gpus=1).chosen.weights)
    pipelined = xir.plan(model(), few, gpus=2, memory=whole, exact=False, tensor=1, shard_weights=False)
    assert pipelined.best["pipefusion"] == 2, "half of the weights each"
    parted = xir.plan(model(), few, gpus=2, memory=whole)
    assert parted.chosen.shard_weights or parted.best["tensor"] == 2, "the same without stages"
    assert any("GiB a GPU" in one.why for one in parted.candidates if one.name == "u2")


@pytest.mark.parametrize(("said", "gib"), [(80, 80), ("80GiB", 80), ("80 GB", 80e9 / 2**30), ("512MiB", 0.5)])
def test_memory_may_have_a_unit(said: float | str, gib: float) -> None:
    assert xir.plan(model(count=1), example(tokens=64), gpus=1, memory=said).memory == pytest.approx(gib)


def test_no_rough_figure_is_under_the_best(of_eight: Plan) -> None:
    """They are scaled by what was worked out; whole weights take no longer than weights in parts."""
    first, *others = of_eight.candidates
    whole = {one.degrees: one.ms for one in of_eight.candidates if one.parts and not one.shard_weights}
    rough = [one for one in others if one.parts is None and one.ms is not None and one.data == 1]
    assert rough and first.ms is not None
    assert all((one.ms or 0) >= max(first.ms, whole.get(one.degrees) or 0) for one in rough)
    small = xir.plan(model(width=256, heads=4), example(batch=2, tokens=256, width=256), gpus=6)
    assert small.chosen.ms == min(one.ms for one in small.candidates if one.ms is not None and one.data == 1)


def test_features_divide_weights() -> None:
    made = xir.plan(model(), example(), gpus=2, tensor=2)
    assert made.chosen.name == "t2" and made.chosen.parts is not None
    alone = xir.plan(model(), example(), gpus=1).chosen
    assert max(made.chosen.weights) == pytest.approx(max(alone.weights) / 2, rel=0.01)
    assert {one.name: one.why for one in made.candidates}["t2 sharded"].startswith("whole weights fit")


def test_what_the_passes_refuse_is_refused_before_it_is_tried() -> None:
    made = xir.plan(model(), example(), gpus=4, pipefusion=2, tensor=2)
    assert [one.legal for one in made.candidates] == [False, False]
    assert "tensor=2 with pipefusion=2: stages divide weights already" in made.candidates[0].why


def test_replicas_make_more_steps_in_the_time_of_one() -> None:
    """They are taken where they are asked for; else it is told what they would do."""
    two = xir.plan(model(), example(), gpus=2, data=2).chosen
    alone = xir.plan(model(), example(), gpus=1).chosen
    assert two.name == "2 x u1" and two.ms == alone.ms and two.a_second == 2 * alone.a_second
    first, *others = xir.plan(model(), example(), gpus=2).candidates
    told = next(one for one in others if one.data == 2)
    assert "data" not in xir.plan(model(), example(), gpus=2).best and first.data == 1
    assert told.ms == alone.ms and "times as many steps a second: for as many requests at a time" in told.why
    assert xir.plan(model(), example(), gpus=2, data=2).best["data"] == 2


def test_weights_over_ranks() -> None:
    """A half of the weights on each of two ranks; gathering them takes links."""
    whole, parts = (xir.plan(model(), example(), gpus=2, tensor=1, shard_weights=given) for given in (False, True))
    assert "shard_weights" not in whole.best and parts.best["shard_weights"] is True
    assert max(parts.chosen.weights) == pytest.approx(max(whole.chosen.weights) / 2, rel=0.01)
    assert parts.chosen.ms is not None and whole.chosen.ms is not None and parts.chosen.ms >= whole.chosen.ms
    assert Plan.from_json(parts.to_json()) == parts


def test_weights_from_the_host() -> None:
    """What does not fit does so then, and waits for the bus: all is uploaded, and the last layer behind that."""
    plans = [xir.plan(model(count=8), example(), gpus=1, memory=0.3, stream_weights=given) for given in (False, True)]
    with pytest.raises(xir.ParallelizeError, match="stream_weights=True"):
        _ = plans[0].best
    assert plans[1].best["stream_weights"] is True and Plan.from_json(plans[1].to_json()) == plans[1]
    (whole, *_), (parts, *_) = (one.candidates for one in plans)
    assert whole.ms is not None and parts.ms == pytest.approx(0.25 * 2**30 / 50e9 * 1e3 + whole.ms / 8, rel=0.01)
    assert max(parts.weights) == 0 and max(whole.weights) == pytest.approx(0.25, rel=0.01)


def test_a_slow_link_costs_what_is_exchanged() -> None:
    """Without peer access nothing hides exchanges, and they take longer."""
    plans = {name: xir.plan(model(), example(), gpus=2, machine=name, ring=1) for name in ("rtx4090-p2p", "rtx4090")}
    peer, host = (next(one for one in made.candidates if one.parts) for made in plans.values())
    assert peer.parts is not None and host.parts is not None
    assert host.parts.products == peer.parts.products
    assert host.parts.exchanges > 2 * peer.parts.exchanges


def test_what_exchanges_most_stays_inside_a_node() -> None:
    nodes = xir.plan(model(), example(), gpus=16, machine="h100-infiniband", tensor=1, shard_weights=False)
    ways = {one.name: one for one in nodes.candidates}
    assert ways["r2u8"].between == ("ring",) and ways["u16"].between == ("ulysses",)
    inside, across = ways["r2u8"].ms, ways["u16"].ms
    assert inside is not None and across is not None and inside < across
    assert nodes.chosen.between == ("ring",) and "between nodes" in str(nodes)
    assert Plan.from_json(nodes.to_json()) == nodes


def test_it_goes_through_json(of_eight: Plan) -> None:
    assert Plan.from_json(of_eight.to_json()) == of_eight and of_eight.speeds == load("h100").prices
    slow = xir.plan(model(), example(), gpus=2, machine=xir.Machine(bytes=1e9), tensor=1)
    assert Plan.from_json(slow.to_json()).speeds.bytes == 1e9, "what is ported by it is divided as it was planned"
    with pytest.raises(xir.ParallelizeError, match=r"this is no plan as Plan\.to_json writes it"):
        Plan.from_json('{"model": "?"}')


def test_as_a_table(of_eight: Plan) -> None:
    text = str(of_eight)
    assert "Layers on 8 x h100" in text and "best" in text and "times as long by" in text
    assert text.index("best") < text.index("cfg=4 divides")
    assert text.count("cfg=4 divides") == 1, "what is illegal for the same reason stands in one row"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gpus": 0}, "gpus=0: expected a positive number"),
        ({"gpus": 4, "ulysses": 3}, "ulysses=3 does not divide 4 GPUs; a product of 2 does"),
        ({"gpus": 4, "data": 3}, "data=3 does not divide 4 GPUs; nearest legal: data=2"),
        ({"gpus": 4, "ulises": 2}, "did you mean ulysses=2"),
        ({"gpus": 2000}, "gpus=2000: a plan goes up to 256 GPUs for one replica; .* data=8"),
        ({"gpus": 1024, "data": 2}, "gpus=1024: .* data=4"),
        ({"memory": -1}, "memory=-1: expected GiB that a GPU may use, such as 80"),
        ({"memory": "80"}, "memory='80': expected GiB .* such as '80GB'"),
        ({"memory": "lots"}, "memory='lots': expected GiB"),
        ({"memory": 80e9}, "memory=80000000000.0: expected GiB .* at most 1048576 GiB"),
        ({"memory": float("nan")}, "memory=nan: expected GiB"),
        ({"exact": "no"}, "exact='no': expected True or False"),
        ({"shard_weights": "yes"}, "shard_weights='yes': expected True or False"),
        ({"machine": "h10"}, "machine='h10' is none that is kept; did you mean 'h100'"),
    ],
)
def test_what_cannot_be_planned(given: dict[str, Any], said: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=said):
        xir.plan(model(), example(), **given)


def test_what_fits_no_other_way_streams_with_as_much_on_the_gpu_as_there_is_room_for() -> None:
    deep, short = model(count=8), example(tokens=1024)
    made = xir.plan(deep, short, gpus=1, memory=0.2)
    first, *others = made.candidates
    assert first.name == "u1 streamed but 0.1 GiB" and 0.15 < max(first.gib) <= 0.2
    assert [one.name for one in others] == ["u1"] and "0.2 may be used" in others[0].why
    assert Plan.from_json(made.to_json()) == made
    assert xir.trace(deep, short).parallelize(**made.best).report().gathered.uploaded < 0.2 * 2**30
    all_of_it = xir.plan(deep, short, gpus=1, memory=0.2, stream_weights=True).chosen
    assert all_of_it.ms is not None and first.ms is not None and first.ms < all_of_it.ms
    assert not any(one.stream_weights for one in xir.plan(deep, short, gpus=2, memory=0.2).candidates), "parts fit"


def test_stages_divide_their_weights_too() -> None:
    few = example(tokens=1024)
    whole, parts = (
        xir.plan(model(count=4), few, gpus=4, pipefusion=2, ulysses=2, shard_weights=given).chosen
        for given in (False, True)
    )
    assert parts.name.endswith("sharded") and max(parts.weights) == pytest.approx(max(whole.weights) / 2, rel=0.02)
    assert parts.ms is not None and whole.ms is not None and parts.ms >= whole.ms


def test_keys_and_values_of_a_plan_stay_in_fewer_bits() -> None:
    plans = [xir.plan(model(), example(), gpus=2, pipefusion=2, kv_cache_dtype=one) for one in ("auto", "fp8_e4m3")]
    whole, small = (max(one.chosen.gib) for one in plans)
    assert small < whole and "kv_cache_dtype" not in plans[0].best
    assert plans[1].best["kv_cache_dtype"] == "fp8_e4m3" and xir.Plan.from_json(plans[1].to_json()) == plans[1]
    assert xir.trace(model(), example()).parallelize(**plans[1].best).report().memory
    steps = {"warmup_steps": 1, "kv_cache_dtype": "auto"}
    assert planned.saved_steps(plans[1], steps)["kv_cache_dtype"] == "fp8_e4m3"
    with pytest.raises(xir.ParallelizeError, match="kv_cache_dtype='bfloat16' beside plan="):
        planned.saved_steps(plans[1], {**steps, "kv_cache_dtype": "bfloat16"})
    with pytest.raises(xir.ParallelizeError, match="kv_cache_dtype='fp4'"):
        xir.plan(model(), example(), gpus=2, kv_cache_dtype="fp4")

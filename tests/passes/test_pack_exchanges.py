"""Exchanges that are ready at the same place are one, and give the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture import bind_inputs
from xdit_ir.ir.collective_ops import Communicate, Together
from xdit_ir.ir.difference import tensors_of
from xdit_ir.ir.graphs import all_graphs
from xdit_ir.ir.interpret import model_state
from xdit_ir.ir.program import Program
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.pack_exchanges import PackExchanges, packs
from xdit_ir.simulation.lockstep import run_ranks
from xdit_ir.text import difference, parse, write

U2, U3, USP, CFG = {"ulysses": 2}, {"ulysses": 3}, {"ulysses": 2, "ring": 2}, {"cfg": 2, "ulysses": 2}
LACKING = {"ulysses": 8}  # more ranks than heads: keys are gathered


@pytest.fixture(scope="module")
def flux() -> tuple[torch.nn.Module, Any, Any]:
    model, example = models.load("flux.1-dev:tiny")
    return model, example, xir.trace(model, example)


def started(program: Program) -> Counter[str]:
    """How often a forward starts which communication."""
    counts: Counter[str] = Counter()
    for _, graph, calls in all_graphs(program):
        for node in graph.nodes:
            if isinstance(node.target, Communicate) and len(node.target.group) > 1:
                counts[node.target.__name__] += calls
    return counts


@pytest.mark.parametrize("degrees", [U2, U3, USP, CFG, LACKING], ids=str)
def test_packed_programs_give_the_same_bits(flux: Any, degrees: dict[str, int]) -> None:
    model, example, traced = flux
    parallel = traced.parallelize(**degrees)
    ranks = [parallel.rank(rank) for rank in range(parallel.world_size)]
    packed = [run_passes(rank, [PackExchanges()]) for rank in ranks]
    assert len({tuple(packs(rank)) for rank in ranks}) == 1, "all ranks pack the same"
    before, after = started(ranks[0]), started(packed[0])
    assert 0 < sum(after.values()) <= sum(before.values()) - len(list(parallel.ir.calls)), after
    inputs: Any = bind_inputs(model, parallel.original, (), example)
    with torch.no_grad():
        plain, joined = (
            run_ranks(programs, model_state(parallel.original, model), inputs, torch.device("cpu"))
            for programs in (ranks, packed)
        )
    assert all(map(torch.equal, (x for rank in plain for x in rank), (x for rank in joined for x in rank)))


def test_what_a_rank_only_sends_is_packed_too() -> None:
    """Samples that are packed into one sequence: the first rank gets nothing from before its part, the last nothing
    from behind it."""
    model, example = models.load("z-image:tiny")
    parallel = xir.trace(model, example).parallelize(cfg=2)
    ranks = [parallel.rank(rank) for rank in range(2)]
    packed = [run_passes(rank, [PackExchanges()]) for rank in ranks]
    assert all(map(packs, ranks)) and sum(started(packed[0]).values()) < sum(started(ranks[0]).values())
    inputs: Any = bind_inputs(model, parallel.original, (), example)
    with torch.no_grad():
        found = run_ranks(packed, model_state(parallel.original, model), inputs, torch.device("cpu"))
        want = parallel.simulate(model, example)
    assert all(map(torch.equal, (x for rank in found for x in rank), (x for rank in want for x in tensors_of(rank))))


def test_a_packed_program_is_text_too(flux: Any) -> None:
    packed = run_passes(flux[2].parallelize(**U2).rank(1), [PackExchanges()])
    document = write(packed)
    assert difference(parse(document.text, document.attachments), packed) is None


def test_only_what_all_ranks_agreed_on_is_packed(flux: Any) -> None:
    rank = flux[2].parallelize(**U2).rank(0)
    first, *others = packs(rank)
    some = run_passes(rank, [PackExchanges(first)])
    assert others and packs(some) == others
    assert sum(isinstance(node.target, Together) for _, graph, _ in all_graphs(some) for node in graph.nodes) == 1

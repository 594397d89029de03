"""Code that exchanges over symmetric memory: slots, custody of what is on its way, and what is left to collectives."""

from __future__ import annotations

import itertools

import pytest
import torch
from standing_in import Here
from torch import fx

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.emission.codegen import Code, generate
from xdit_ir.emission.fold import fold_constants
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.use_copy_engines import UseCopyEngines
from xdit_ir.planning import hardware
from xdit_ir.sharding.machine import H100, Machine
from xdit_ir.transport.mailbox import PeerReceive, PeerSend, slot_sequence
from xdit_ir.transport.release import Release
from xdit_ir.transport.workspace import SLOTS, read_letter
from xdit_ir.transport.workspaces import Workspaces


def code(name: str, machine: Machine = H100, rank: int = 0, **degrees: int) -> Code:
    parallel = xir.trace(*models.load(name)).parallelize(**degrees, machine=machine)
    lowered = run_passes(fold_constants(parallel.rank(rank)), [UseCopyEngines()])
    return generate(lowered, Here(parallel.mesh, rank), torch.device("cuda", 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("calls", range(2, 9))
def test_neighbouring_calls_take_different_slots_also_over_two_forwards(calls: int) -> None:
    twice = slot_sequence(calls) * 2
    assert all(a != b for a, b in itertools.pairwise(twice))


def channels(made: Code) -> set[int]:
    modules = [module for body in made.bodies.values() for module in body.module.children()]
    return {module.place.channel for module in modules if isinstance(module, PeerSend)}


def peers(module: fx.GraphModule) -> list[fx.Node]:
    kinds = (PeerSend, PeerReceive)
    return [
        n for n in module.graph.nodes if n.op == "call_module" and isinstance(module.get_submodule(n.target), kinds)
    ]


def test_blocks_exchange_over_peers_and_the_rest_by_collectives() -> None:
    made = code("flux.1-dev:tiny", ulysses=2)
    assert made.mailbox is not None and made.mailbox.members == (0, 1)
    assert len(channels(made)) == 8
    for body in made.bodies.values():
        assert body.uses_mailbox and len(peers(body.module)) == 8
    assert not peers(made.run)


def test_what_was_sent_is_kept_until_a_later_message_or_a_flag_proves_that_it_left() -> None:
    for body in code("flux.1-dev:tiny", ulysses=2).bodies.values():
        calls = peers(body.module)
        sends = [body.module.get_submodule(str(n.target)) for n in calls]
        told = [module.fixed["tell_self"] for module in sends if isinstance(module, PeerSend)]
        assert told == [False, False, False, True], "only the last exchange of a block has no later one"
        assert len(calls[-1].args) == 3 + 3, "q, k and v are kept until the result has come back"


@pytest.mark.parametrize("name", ["flux.1-dev:tiny", "qwen-image-2.1:tiny"])
def test_no_compiler_may_change_the_order_of_exchanges(name: str) -> None:
    for body in code(name, ulysses=2).bodies.values():
        for before, after in itertools.pairwise(peers(body.module)):
            assert before in after.args, "ranks that start in other orders wait for each other for ever"


@pytest.mark.parametrize("name", ["anyflow-14b:tiny", "sana-1600m:tiny"])
def test_a_block_may_send_what_it_was_given_before_it_computes_anything(name: str) -> None:
    bodies = code(name, hardware.load("h200").prices, ulysses=2).bodies.values()
    nodes = [[node for node in body.module.graph.nodes if node.op != "placeholder"] for body in bodies]
    assert any(peers(body.module)[:1] == found[:1] for body, found in zip(bodies, nodes, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_needs_nothing_of_is_awaited_too(rank: int) -> None:
    made = code("anyflow-14b:tiny", hardware.load("h200").prices, rank=rank, ulysses=2)
    for body in made.bodies.values():
        kinds = [type(module).__name__ for module in body.module.children()]
        assert kinds.count("PeerSend") == kinds.count("PeerReceive")
        assert kinds.count("Send") == kinds.count("Receive")


def test_exchanges_by_peers_and_by_collectives_have_one_order() -> None:
    for body in code("anyflow-far:tiny", hardware.load("h200").prices, ulysses=2).bodies.values():
        if not body.uses_mailbox:
            continue
        exchanges = [n for n in body.module.graph.nodes if n.op == "call_module"]
        starts = [n for n in exchanges if not isinstance(body.module.get_submodule(n.target), PeerReceive)]
        assert {type(body.module.get_submodule(n.target)).__name__ for n in starts} == {"PeerSend", "AllReduce"}
        for before, after in itertools.pairwise(starts):
            assert reaches(after, before), "a compiler could start them in the other order, on some ranks only"


def reaches(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node needs `source` as what it comes after, or what was done after that."""
    told = [*node.kwargs.get("after", ()), *node.args[3:]]
    return any(one is source or source in one.all_input_nodes for one in told)


def test_slots_alternate_over_the_calls_of_a_block() -> None:
    made = code("wan2.1-t2v-14b:tiny", ulysses=2)
    names = [str(node.args[-1]) for node in made.run.graph.nodes if str(node.target).startswith("block_")]
    assert all(a != b for a, b in itertools.pairwise(names)) and names[0] != names[-1]


def test_offsets_hold_the_largest_part_of_any_member() -> None:
    made = code("flux.1-dev:tiny", ulysses=3)
    assert made.mailbox is not None
    places = sorted(
        (start, module.place.channel)
        for body in made.bodies.values()
        for module in body.module.children()
        if isinstance(module, PeerSend)
        for start in module.place.slots
    )
    assert len({start for start, _ in places}) == len(places) and places[0][0] >= 64
    assert made.mailbox.size > places[-1][0]


def test_letters_say_where_and_what_so_that_code_does_not() -> None:
    made = code("flux.1-dev:tiny", ulysses=2)
    assert made.mailbox is not None
    for name, body in made.bodies.items():
        sends = [module for module in body.module.children() if isinstance(module, PeerSend)]
        for slot in (0, 1):
            letter = made.mailbox.letter(name, slot)
            for send in sends:
                place = send.place
                number, offset, _, plan = read_letter(letter, send.fixed["place"])
                assert (number, offset, tuple(plan)) == (SLOTS * place.channel + slot, place.slots[slot], place.plan)


def test_programs_share_workspaces_and_meet_where_another_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []
    monkeypatch.setattr(Workspaces, "_open", lambda self, nbytes, group: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(Workspaces, "_meet", lambda self, workspace, group: met.append(workspace.numel()))
    shared = Workspaces(torch.device("cpu"), Release())
    sizes = [shared.take(size, "0").numel() for size in (100, 90, 110, 140, 160, 20)]
    assert sizes == [100, 100, 150, 150, 225, 100], "few, each large enough, and all stay where they are"
    workspace = shared.take(100, "0")
    assert shared.take(100, "1") is not workspace
    for user in ("one", "one", "other", "other", "one"):
        shared.enter(workspace, "0", user)
    assert met == [100, 100], "only where the program changes"

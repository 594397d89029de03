"""Code for GPUs: all ranks start their exchanges in one order, whatever each of them needs of what these give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from standing_in import Here
from torch import fx

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram
from xdit_ir.emission.codegen import Code, generate
from xdit_ir.emission.fold import fold_constants
from xdit_ir.passes.base import run_passes
from xdit_ir.passes.order import rank_passes
from xdit_ir.passes.use_copy_engines import UseCopyEngines, candidates
from xdit_ir.planning import hardware

FEW = ("anyflow-14b", "cosmos3-omni", "sana-1600m")
DEGREES: dict[str, dict[str, int]] = {
    "u2": {"ulysses": 2},
    "r2": {"ring": 2},
    "c2": {"cfg": 2},
    "u3": {"ulysses": 3},
    "t2": {"tensor": 2},
    "t2u2": {"tensor": 2, "ulysses": 2},
}
WAITS = {"AddUp", "PackedReceive", "PeerReceive", "Receive", "ReceiveParts"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A few models under two sets; all of the zoo under all with `--zoo-all`."""
    everything = metafunc.config.getoption("--zoo-all")
    metafunc.parametrize("name", sorted(models.names()) if everything else FEW)
    metafunc.parametrize("degrees", DEGREES if everything else ("u2", "t2u2"))


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """Those of a module's models that were traced."""
    return {}


def test_all_ranks_start_their_exchanges_in_one_order(name: str, degrees: str, traced: dict[str, Any]) -> None:
    if name not in traced:
        traced.clear()
        traced[name] = xir.trace(*models.load(f"{name}:tiny"))
    try:
        parallel = traced[name].parallelize(**DEGREES[degrees], machine=hardware.load("h200").prices)
    except xir.ParallelizeError as error:
        assert "cfg" in DEGREES[degrees] and "divides the batch" in str(error)
        pytest.skip(str(error))
    for peers in (True, False):
        first, *others = map(started, codes(parallel, peers=peers))
        assert all(one == first for one in others)


def codes(parallel: ParallelProgram, *, peers: bool) -> list[Code]:
    """That of every rank; exchanges that all can do so go by `peers`."""
    passes = rank_passes((9, 0), compiled=True, recorded=True)
    lowered = [run_passes(fold_constants(parallel.rank(rank)), passes) for rank in range(parallel.world_size)]
    mine, *others = map(candidates, lowered)
    common = [one for one in mine if all(one in each for each in others)] if peers else []
    lowered = [run_passes(one, [UseCopyEngines("+".join(common))]) if common else one for one in lowered]
    gpu = torch.device("cuda", 0)
    return [generate(one, Here(parallel.mesh, rank), gpu) for rank, one in enumerate(lowered)]  # type: ignore[arg-type]


def started(code: Code) -> list[str]:
    """The exchanges of a forward in the order in which they are written, by their kinds; all are awaited."""
    kinds = list(written(code.run))
    starts = [kind for kind in kinds if kind not in WAITS]
    halves = [kind for kind in starts if kind in ("PackedSend", "PeerSend", "Send", "SendParts")]
    assert len(halves) == len(kinds) - len(starts)
    return starts


def written(module: fx.GraphModule) -> Any:
    """Kinds of modules that are called, in blocks too."""
    for node in module.graph.nodes:
        if node.op == "call_module":
            inner = module.get_submodule(str(node.target))
            if isinstance(inner, fx.GraphModule):
                yield from written(inner)
            else:
                yield type(inner).__name__

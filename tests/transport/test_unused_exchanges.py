"""A rank that needs nothing of what an exchange gives takes part in it: others wait for what it sends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo.backends.common import aot_autograd

import xdit_ir.transport.exchange_op
import xdit_ir.transport.peer_ops  # noqa: F401
from xdit_ir.transport.wire import begin, begin_gather, begin_sum, wait

X, BYTES, LETTER = torch.zeros(4, 4), torch.zeros(64, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


def put_and_wait(x: torch.Tensor) -> torch.Tensor:
    sent = torch.ops.xdit_ir.peer_put(x, [], BYTES, LETTER, "0", 0, False)
    torch.ops.xdit_ir.peer_wait([sent], BYTES, LETTER, "0", 0, [4, 4], torch.float32, False, 1)
    return x + 1


def exchange(x: torch.Tensor) -> torch.Tensor:
    torch.ops.xdit_ir.exchange(x, [], [8, 8], [8, 8], "0")
    torch.ops.xdit_ir.exchange_tables([x], [], [8, 8], "0")
    return x + 1


@pytest.mark.parametrize(
    ("function", "kept"), [(put_and_wait, {"peer_put", "peer_wait"}), (exchange, {"exchange", "exchange_tables"})]
)
def test_no_compiler_leaves_an_exchange_out(function: Callable[[torch.Tensor], torch.Tensor], kept: set[str]) -> None:
    found = set[str]()

    def look(module: fx.GraphModule, given: object) -> fx.GraphModule:
        module.graph.eliminate_dead_code()
        found.update(str(node.target).split(".")[1] for node in module.graph.nodes if "xdit_ir" in str(node.target))
        raise RuntimeError("seen")

    with torch.no_grad(), pytest.raises(Exception, match="seen"):
        torch.compile(function, backend=aot_autograd(fw_compiler=look), fullgraph=True)(X)
    assert found == kept


def begun(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    before = [x + 1]
    sent = begin(x.view(-1), [16], [16], "0", before, at_once=False)
    gathered = begin_gather(x.view(-1), 1, "0", [sent])
    added = begin_sum(x * 2, "0", [gathered])
    return wait(sent) * 2, wait(gathered) * 3, wait(added) * 4


def test_what_is_begun_after_something_else_is_what_a_collective_gives() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.arange(16.0).view(4, 4)
        with torch.no_grad():
            for run in (begun, torch.compile(begun, fullgraph=True)):
                for got, factor in zip(run(x), (2, 3, 8), strict=True):
                    torch.testing.assert_close(got.view(4, 4), x * factor)
    finally:
        dist.destroy_process_group()

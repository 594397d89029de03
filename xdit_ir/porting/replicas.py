"""Which replica of a port this process runs."""

from __future__ import annotations

from typing import Any

from torch import nn

from xdit_ir.errors import ParallelizeError
from xdit_ir.porting.denoisers import components
from xdit_ir.porting.ported import Ported
from xdit_ir.transport.distributed import replica_of_process
from xdit_ir.transport.replicas import Replica


def replica(port: Any) -> Replica:
    """Which replica of what `port` has made, a module or a pipeline, this process is in, and its place there.

    With `port(pipe, ulysses=2, data=2)` on four processes, each two make images together:

        mine = xdit_ir.replica(pipe)
        images = [pipe(prompt, generator=seeded) for prompt in mine.share(prompts)]
        if mine.rank == 0: ...  # this process writes those of replica mine.index

    Raises:
        ParallelizeError: nothing of it is ported.
    """
    modules = [port] if isinstance(port, nn.Module) else components(port).values()
    made = next((one._xdit_made for one in modules if isinstance(one, Ported)), None)
    if made is None:
        raise ParallelizeError(f"replica() takes what port() has made, and nothing of this {type(port).__name__} is")
    return replica_of_process(made.mesh, made.options.data)

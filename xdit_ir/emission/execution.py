"""How an emitted module runs: eagerly, compiled, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xdit_ir.errors import ParallelizeError
from xdit_ir.kernels.backends import check_name
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.order import rank_passes

Tensors = list[torch.Tensor]
TRANSPORTS = ("auto", "collective", "peer")


@dataclass(frozen=True)
class Execution:
    """Options of `emit` and `port`.

    Args:
        compile: compile each shared block once with torch.compile; all layers use that code.
        cuda_graph: record the forward as one CUDA graph at the first call and replay it; moved weights are noticed
            and recorded anew. Inputs are copied in, results copied out. In a pipeline: one graph for each stage and
            patch of a rank, and one for each stage of a synchronous step.
        transport: how exchanges inside blocks travel. "peer": by the GPUs' copy engines over symmetric memory, where
            all ranks are GPUs of one host that reach each other, else by collectives; "collective": by collectives;
            "auto": "peer" in a CUDA graph, where starting copies costs no time on the host.
        attention: the kernel for attention: "auto", by device and shape; "sdpa", what PyTorch chooses; or one of
            `xdit_ir.kernels.backends.BACKENDS`, for every attention that it can do.
        handshake: before every forward, make sure that all ranks make the same call, and raise on all if not; under
            PipeFusion, a further step of a request is compared when the next one is called.
    """

    compile: bool = False
    cuda_graph: bool = False
    transport: str = "auto"
    attention: str = "auto"
    handshake: bool = True

    @property
    def uses_peers(self) -> bool:
        """Whether exchanges shall go over symmetric memory where they can."""
        return self.transport == "peer" or (self.transport == "auto" and self.cuda_graph)

    def check(self, device: torch.device) -> None:
        """Raise `ParallelizeError` for what does not exist, or `device` cannot do."""
        if self.transport not in TRANSPORTS:
            raise ParallelizeError(f"transport={self.transport!r}; there are {', '.join(TRANSPORTS)}")
        check_name(self.attention)
        if self.cuda_graph and device.type != "cuda":
            raise ParallelizeError(f"cuda_graph=True needs a model on a CUDA device, this one is on {device}")

    def passes(self, device: torch.device, *, peers: bool = False) -> list[Pass]:
        """What is done to a rank's program for `device`; `peers`: exchanges inside blocks may go over its peers."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return rank_passes(capability, self.attention, recorded=self.cuda_graph, peers=peers)


@contextmanager
def plain_modes(*kinds: str) -> Iterator[None]:
    """Outside of inference mode, gradients and autocast on devices of these `kinds`, whatever the caller's mode is.

    So code is compiled and recorded once; casts of autocast are in programs already, or were recorded as operators.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def as_normal_tensor(x: torch.Tensor) -> torch.Tensor:
    """A tensor that can be used outside of inference mode: itself, or a copy."""
    return x.clone() if x.is_inference() else x


def compile_body(module: nn.Module, *, fixed: bool = False) -> None:
    """Compile in place; one graph, static shapes, and the order of operators as it is written.

    `fixed`: some intermediate tensors lie in memory that others write to, so none may be used for something else.
    """
    options: dict[str, Any] = {"reorder_for_peak_memory": False, "reorder_for_locality": False}
    if fixed:
        options |= {"allow_buffer_reuse": False, "inplace_buffers": False}
    module.compile(fullgraph=True, dynamic=False, options=options)


class Recording:
    """A function of tensors as one CUDA graph, whose inputs and outputs have fixed addresses.

    Args:
        run: takes the inputs, which are copied each time, and the weights, which are used where they are.
        pool: memory shared with other recordings, of which no two are replayed at the same time.
    """

    WARMUPS = 2  # the first compiles and makes communicators, the second shows allocators the steady state

    def __init__(self, run: Callable[[Tensors, Tensors], Sequence[torch.Tensor]], pool: Any = None) -> None:
        self._run, self._pool = run, pool
        self._addresses: list[int] = []
        self._inputs: Tensors = []
        self._outputs: Sequence[torch.Tensor] = ()
        self._graph: Any = None

    def __call__(self, inputs: Tensors, weights: Tensors) -> Tensors:
        """The results for these inputs, in tensors of their own."""
        addresses = [weight.data_ptr() for weight in weights]
        if self._graph is None or addresses != self._addresses:
            self._record(inputs, weights)
            self._addresses = addresses
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def forget(self) -> None:
        """Free the graph; the next call records anew. NCCL ends no communicator that a graph still refers to."""
        self._graph, self._inputs, self._outputs = None, [], ()

    def _record(self, inputs: Tensors, weights: Tensors) -> None:
        self.forget()
        self._inputs = [x.clone() for x in inputs]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(self.WARMUPS):
                self._run(self._inputs, weights)
        current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=self._pool):
            self._outputs = self._run(self._inputs, weights)

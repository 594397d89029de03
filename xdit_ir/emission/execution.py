"""How an emitted module runs: eagerly, compiled, or recorded in CUDA graphs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from xdit_ir.errors import ParallelizeError
from xdit_ir.kernels.backends import check_name
from xdit_ir.passes.contract import Pass
from xdit_ir.passes.order import rank_passes

Tensors = list[torch.Tensor]
TRANSPORTS = ("auto", "collective", "packed", "peer")
MODES = ("auto", "eager", "compiled", "graph")


OFTEN = 8  # calls of a block in a forward


@dataclass(frozen=True)
class Execution:
    """Options of `emit` and `port`.

    Args:
        compile: compile each shared block once with torch.compile; all layers use that code.
        cuda_graph: record the forward in CUDA graphs at the first call and replay them; moved weights are noticed
            and recorded anew. Inputs are copied in, results copied out. What graphs cannot hold is run by the host
            between them, see `xdit_ir.emission.recording`. In a pipeline: graphs for each stage and patch of a rank,
            and for each stage of a synchronous step.
        transport: how exchanges inside blocks travel. "peer": by the GPUs' copy engines over symmetric memory, where
            all ranks are GPUs of one host that reach each other, else by collectives; "collective": each by a
            functional collective of its own; "packed": those that are ready at the same place (q, k and v) by one,
            which eager code starts without PyTorch's functional layer; "auto": "peer" in a CUDA graph, where starting
            copies costs no time on the host, else "packed". With "peer" ranks fetch parts of weights (`shard_weights`)
            from each other's memory too, by copy engines, instead of gathering them by NCCL.
        attention: the kernel for attention: "auto", by device and shape; "sdpa", what PyTorch chooses; or one of
            `xdit_ir.kernels.backends.BACKENDS`, for every attention that it can do.
        handshake: before every forward, make sure that all ranks make the same call, and raise on all if not; under
            PipeFusion, a further step of a request is compared when the next one is called. It also compares what the
            inputs and weights hold, and makes all ranks raise `LostError` where one fails, stops or ends.
        mode: "eager"; "compiled", as `compile`; "graph", as `compile` and `cuda_graph`; "auto", the fastest that
            works: as "graph" on CUDA, where a block that cannot be compiled stays as it is, and a part that cannot be
            recorded is run by the host, with a warning; as "eager" elsewhere, and, under `port`, for what runs once
            beside denoisers (docs/pipelines.md). None: as `compile` and `cuda_graph` say.
        timeout: seconds after which a rank gives up waiting for others; None: that of the caller's default process
            group, at most ten minutes.
    """

    compile: bool = False
    cuda_graph: bool = False
    transport: str = "auto"
    attention: str = "auto"
    handshake: bool = True
    mode: str | None = None
    timeout: float | None = None

    @staticmethod
    def of(
        mode: str,
        compile: bool | None,
        cuda_graph: bool | None,
        transport: str,
        attention: str,
        handshake: bool,
        timeout: float | None,
    ) -> Execution:
        """From the options of `port`: `compile` and `cuda_graph`, where one of them is given, else `mode`.

        Raises:
            ParallelizeError: there is no such mode, transport, kernel or timeout, or `mode` is given beside the others.
        """
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ParallelizeError(f"mode={mode!r}; there are {', '.join(MODES)}{hint}")
        for name, given in (("compile", compile), ("cuda_graph", cuda_graph)):
            if given is not None and not isinstance(given, bool):
                raise ParallelizeError(f"{name}={given!r}: expected True, False or None")
        if compile is None and cuda_graph is None:
            return Execution(False, False, transport, attention, handshake, mode, timeout).checked()
        if mode != "auto":
            raise ParallelizeError(f"mode={mode!r} says what compile= and cuda_graph= say; give one or the other")
        return Execution(bool(compile), bool(cuda_graph), transport, attention, handshake, None, timeout).checked()

    def on(self, device: torch.device) -> Execution:
        """The same with `compile` and `cuda_graph` as `mode` means them on a device."""
        if self.mode is None:
            return self
        fast = self.mode == "auto" and device.type == "cuda"
        return replace(
            self, compile=fast or self.mode in ("compiled", "graph"), cuda_graph=fast or self.mode == "graph"
        )

    @property
    def forced(self) -> bool:
        """Whether what cannot be compiled or recorded is an error."""
        return self.mode != "auto"

    @property
    def limit(self) -> timedelta | None:
        """The timeout, if one was given."""
        return None if self.timeout is None else timedelta(seconds=self.timeout)

    @property
    def uses_peers(self) -> bool:
        """Whether exchanges, and parts of weights, shall go over symmetric memory where they can."""
        return self.transport == "peer" or (self.transport == "auto" and self.cuda_graph)

    @property
    def packs(self) -> bool:
        """Whether exchanges that are ready at the same place shall be one."""
        return self.transport == "packed" or (self.transport == "auto" and not self.cuda_graph)

    @property
    def is_plain(self) -> bool:
        """Whether code is run as it is, neither compiled nor recorded: it may call the process group itself."""
        return not (self.compile or self.cuda_graph)

    @property
    def exchanges_at_once(self) -> bool:
        """Whether compiled code waits for an exchange where it starts it: without a graph that costs the host less."""
        return self.packs and self.compile and not self.cuda_graph

    def launches_itself(self, device: torch.device, times: int) -> bool:
        """Whether code that a forward calls so many times shall launch its kernels without Python: where no graph does
        it, and often enough to be worth half a minute of compilation."""
        return device.type == "cuda" and self.compile and not self.cuda_graph and times >= OFTEN

    def checked(self) -> Execution:
        """This; raises `ParallelizeError` for what exists on no device."""
        if self.transport not in TRANSPORTS:
            near = difflib.get_close_matches(str(self.transport), TRANSPORTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ParallelizeError(f"transport={self.transport!r}; there are {', '.join(TRANSPORTS)}{hint}")
        check_name(self.attention)
        if not isinstance(self.handshake, bool):
            raise ParallelizeError(f"handshake={self.handshake!r}: expected True or False")
        if self.timeout is not None and not (isinstance(self.timeout, int | float) and self.timeout > 0):
            raise ParallelizeError(f"timeout={self.timeout!r}: expected a positive number of seconds, or None")
        return self

    def check(self, device: torch.device) -> None:
        """Raise `ParallelizeError` for what does not exist, or `device` cannot do."""
        self.checked()
        if self.cuda_graph and device.type != "cuda":
            option = "cuda_graph=True" if self.mode is None else f"mode={self.mode!r}"
            there = "compile=True" if self.mode is None else "mode='compiled'"
            raise ParallelizeError(
                f"{option} needs a model on a CUDA device, this one is on {device}; nearest legal: {there}"
            )

    def passes(self, device: torch.device) -> list[Pass]:
        """What is done to a rank's program for `device`, before exchanges are given to copy engines."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return rank_passes(capability, self.attention, compiled=self.compile, recorded=self.cuda_graph)


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


def is_watched() -> bool:
    """Whether a dispatch mode of the caller's, such as a counter of FLOPs, wants to see every operator: compiled code
    cannot be called then, and a CUDA graph would show it nothing."""
    return _get_current_dispatch_mode() is not None


def as_normal_tensor(x: torch.Tensor) -> torch.Tensor:
    """A tensor that can be used outside of inference mode: itself, or a copy."""
    return x.clone() if x.is_inference() else x


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])

"""Time and peak memory of the phases of a generation: load, port, encode, denoise, decode."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_ir.deferral.deferred import Deferred, materialize
from xdit_ir.porting.components import METHODS
from xdit_ir.porting.denoisers import components, takes_timestep
from xdit_ir.porting.methods import PortedMethod
from xdit_ir.porting.ported import Ported

PHASES = ("load", "port", "encode", "denoise", "decode")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Usage:
    """Seconds, and the most memory in use at one time, in bytes: of the process, and on its GPU (0 without one)."""

    seconds: float = 0.0
    host: int = 0
    device: int = 0

    def as_dict(self) -> dict[str, float]:
        """For JSON, memory in GiB."""
        gib = {"host_gib": self.host / 2**30, "device_gib": self.device / 2**30}
        return {name: round(value, 4) for name, value in ({"seconds": self.seconds} | gib).items()}


class Meter:
    """A clock that goes from phase to phase; what happens between two `end`s belongs to the second's phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, Usage] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last phase."""
        self._wait()
        self._reset()
        self._since = time.perf_counter()

    def end(self, phase: str, at: float | None = None) -> None:
        """The time up to now, or up to a moment in the past (for which the device is not waited), was this phase."""
        if at is None:
            self._wait()
            at = time.perf_counter()
        usage = self.phases.setdefault(phase, Usage())
        usage.seconds += at - self._since
        usage.host = max(usage.host, _peak_resident())
        if self.device.type == "cuda":
            usage.device = max(usage.device, torch.cuda.max_memory_allocated(self.device))
        self._since = at
        self._reset()

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Every phase in order."""
        return {phase: self.phases[phase].as_dict() for phase in PHASES if phase in self.phases}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            _RESET.write_text("5")  # Linux: the peak becomes what is resident now
        except OSError:
            return  # not allowed here: the peak is that since the process began


def _peak_resident() -> int:
    found = re.search(r"VmHWM:\s*(\d+)", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) * 1024 if found else 0


class Watch:
    """What of a pipeline's call has happened, by its first denoiser and by what decodes."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.denoising, self.decoding = meter, False, False
        self._began, self._programs = 0.0, 0

    @property
    def phase(self) -> str:
        """What goes on now."""
        return "decode" if self.decoding else "denoise" if self.denoising else "encode"

    def first_step(self, module: nn.Module, args: Any) -> None:
        """A denoiser is called."""
        if not self.denoising:
            self.meter.end("encode")
            self.denoising = True

    def before(self, port: Any, args: Any = ()) -> None:
        """What is ported is called."""
        self._began, self._programs = time.perf_counter(), len(port.programs)

    def after(self, port: Any, args: Any = (), output: Any = None) -> None:
        """It has returned; a call that made a program was spent on porting."""
        if len(port.programs) > self._programs:
            self.meter.end(self.phase, at=self._began)
            self.meter.end("port")

    def coder(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`encode`, or `decode`, which ends the denoising: what of that is still to be computed is computed before."""
        args, kwargs = pytree.tree_map_only(Deferred, materialize, (args, kwargs))
        if name == "decode" and self.denoising and not self.decoding:
            self.meter.end("denoise")
            self.decoding = True
        port = getattr(method, "__self__", None)
        if not isinstance(port, PortedMethod):
            return method(*args, **kwargs)
        self.before(port)
        result = method(*args, **kwargs)
        self.after(port)
        return result

    def finish(self) -> None:
        """The pipeline has returned."""
        self.meter.end("decode" if self.decoding else "denoise")


@contextmanager
def watching(pipe: Any, meter: Meter) -> Iterator[Watch]:
    """Measure one call of a pipeline, ported or not; leaves the pipeline as it was."""
    watch = Watch(meter)
    modules = components(pipe)
    ported = [module for module in modules.values() if isinstance(module, Ported)]
    with ExitStack() as undo:
        for module in [module for module in modules.values() if takes_timestep(module)] or ported:
            undo.callback(module.register_forward_pre_hook(watch.first_step).remove)
        for port in ported:
            undo.callback(port.register_forward_pre_hook(watch.before).remove)
            undo.callback(port.register_forward_hook(watch.after).remove)
        for module in modules.values():
            _watch_coders(module, watch, undo)
        meter.restart()
        yield watch
        watch.finish()


def _watch_coders(module: nn.Module, watch: Watch, undo: ExitStack) -> None:
    """Watch the methods of an autoencoder that are ported, or else `decode` of what has one."""
    found = {name: own for name in METHODS if isinstance(own := vars(module).get(name), PortedMethod)}
    for name, port in found.items():
        port.watch = partial(watch.coder, name)
        undo.callback(setattr, port, "watch", None)
    decode = getattr(module, "decode", None)
    if not found and callable(decode) and not isinstance(module, Ported) and "decode" not in vars(module):
        module.decode = lambda *args, **kwargs: watch.coder("decode", decode, args, kwargs)  # type: ignore[assignment]
        undo.callback(module.__dict__.pop, "decode")


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of every phase over runs, and of their sum."""
    rows = [{phase: usage["seconds"] for phase, usage in run.items()} for run in runs]
    rows = [row | {"total": sum(row.values())} for row in rows]
    names = [name for name in (*PHASES, "total") if any(name in row for row in rows)]
    columns = {name: [row.get(name, 0.0) for row in rows] for name in names}
    return {
        name: {"median": round(statistics.median(column), 4), "min": min(column), "max": max(column)}
        for name, column in columns.items()
    }

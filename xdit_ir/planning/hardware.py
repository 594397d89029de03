"""What GPUs, links and hosts can do, as data: a few machines are kept in `machines/`, each figure with its source."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.mesh import Mesh
from xdit_ir.planning import measured
from xdit_ir.planning.plain import read
from xdit_ir.sharding.machine import H100, Machine, checked
from xdit_ir.sharding.speeds import Kernels, Link, Links

GIB = 2**30
CPU, BETWEEN = "cpu", "h100-infiniband"


@dataclass(frozen=True)
class Hardware:
    """A machine: `memory` bytes of a GPU; `links` from the fastest to the widest; `host`: seconds in which the host
    starts one kernel, and `host_exchange` an exchange, where no CUDA graph does; `graphs`: whether there are such.
    `machine`: averages over whole forwards, for what is priced without sizes. `devices`: parts of the names by which
    PyTorch calls the GPU. `sources`: where each figure is from."""

    name: str
    title: str
    memory: float
    kernels: Kernels
    links: tuple[Link, ...]
    machine: Machine
    host: float = 0.0
    host_exchange: float = 0.0
    graphs: bool = True
    devices: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return self.title

    @property
    def prices(self) -> Machine:
        """By which passes choose: the same figures that a plan is worked out with."""
        return replace(self.machine, kernels=self.kernels, links=Links(self.links))

    def link(self, ranks: Sequence[int]) -> Link:
        """What connects these ranks: the first link that reaches from the first of them to the last."""
        return Links(self.links).between(ranks)

    def on_hosts(self, near: int) -> Hardware:
        """The same in hosts of `near` GPUs each. Copy engines reach one host only; between hosts is what its widest
        link is, or that between nodes of `BETWEEN` if that is slower."""
        link = load(BETWEEN).links[-1]
        wide = self.links[-1]
        between = Link(link.ranks, min(link.bytes, wide.bytes), max(link.latency, wide.latency), hidden=False)
        first = self.links[0]
        inside = replace(first, ranks=min(first.ranks, near), hidden=False)
        return replace(self, name=f"{self.name or self.title} in hosts of {near}", links=(inside, between))

    def seconds(self, rank: int, group: Sequence[int], sent: float) -> float:
        """Time of an exchange in which `rank` sends so many bytes, as many to each other of a group."""
        sending = Links(self.links).sending(rank, group, sent)
        return self.link(group).latency + sending if sending else 0.0

    def between(self, mesh: Mesh) -> tuple[str, ...]:
        """The mesh dims along which ranks are not within reach of the fastest link."""
        fast = self.links[0]
        groups = {name: {mesh.group(rank, (name,)) for rank in range(mesh.world_size)} for name in mesh.names}
        return tuple(name for name, found in groups.items() if any(self.link(group) != fast for group in found))

    @staticmethod
    def plain(machine: Machine) -> Hardware:
        """One with what is known of a machine (else the same speeds for all sizes), and as much memory as is needed."""
        flops, memory = machine.flops, machine.memory
        kernels = machine.kernels or Kernels(flops, flops, flops, flops, memory, memory)
        links = machine.links or Links((Link(1 << 20, machine.bytes, machine.latency),))
        averages = replace(machine, kernels=None, links=None)
        return Hardware("", str(machine), float("inf"), kernels, links.each, averages)


def names() -> list[str]:
    """The machines that are kept."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def load(name: str) -> Hardware:
    """A machine that is kept, or that was measured here, by name; or that of a file.

    Raises:
        ParallelizeError: there is none of this name, and says which there are; or the file is no machine.
    """
    if name.endswith(".toml"):
        return _file(name, Path(name))
    if name in names():
        return _kept(name)
    own = {path.stem: path for path in sorted(measured.folder().glob("*.toml"))}
    if name in own:
        return _file(name, own[name])
    there = [*names(), *own]
    near = difflib.get_close_matches(str(name), there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ParallelizeError(f"machine={name!r} is none that is kept; {hint}there are {', '.join(there)}")


def kept_data(name: str) -> Mapping[str, Any]:
    """What the file of a machine that is kept says."""
    return tomllib.loads(_folder().joinpath(f"{name}.toml").read_text("utf-8"))


@lru_cache
def _kept(name: str) -> Hardware:
    return _read(name, kept_data(name))


def _file(name: str, path: Path) -> Hardware:
    if not path.exists():
        raise ParallelizeError(f"there is no file {path}; `xdit-ir calibrate --output {path}` writes one")
    try:
        return _read(name, tomllib.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ParallelizeError(
            f"{path} is no machine as `xdit-ir calibrate` writes it: {error}; mend that, or calibrate again"
        ) from None


def hardware_of(machine: str | Machine | Hardware | None) -> Hardware:
    """From a name, from plain speeds (those that are the default mean an H100), or the thing itself; None: that of the
    GPUs here, or an H100.

    Raises:
        ParallelizeError: it is none of these.
    """
    if isinstance(machine, Hardware):
        return machine
    if machine is None:
        return hardware_here(torch.device("cuda")) if torch.cuda.is_available() else _kept("h100")
    if isinstance(machine, str):
        return load(machine)
    if machine == H100:
        return load("h100")
    known = (_kept(name) for name in names()) if checked(machine).kernels is not None else ()
    return next((one for one in known if one.prices == machine), None) or Hardware.plain(machine)


def parse(text: str) -> Hardware:
    """From the command line: the name of one that is kept, or plain speeds as `Machine.parse` reads them."""
    return Hardware.plain(Machine.parse(text)) if "=" in text else load(text)


def hardware_here(device: torch.device) -> Hardware:
    """The machine of this process: as it was measured (`xdit-ir calibrate`), else by the name of the GPU.

    Raises:
        ParallelizeError: it was measured, but the file is no machine.
    """
    named = measured.device_name(device)
    if (path := measured.folder() / measured.file_name(named)).exists():
        return _file(path.stem, path)
    return _kept(CPU) if named == CPU else hardware_named(named)


def slowest_here() -> Machine:
    """The averages of what is slowest of that which these processes may run on, the same on every rank without a word:
    of all GPUs that are kept, or, on CPUs, those that programs are made for there."""
    kept = (_kept(name).machine for name in names() if name != CPU) if torch.cuda.is_available() else (H100,)
    return min(kept, key=lambda one: one.flops)


def hardware_named(gpu: str) -> Hardware:
    """That which is kept with the GPU that PyTorch calls so; one that is not known counts as the H100."""
    known = (_kept(name) for name in names())
    return next((one for one in known if any(part in gpu for part in one.devices)), _kept("h100"))


def _folder() -> Any:
    return resources.files(__package__).joinpath("machines")


@dataclass(frozen=True)
class _File:
    """What the file of a machine says, see `Hardware`; `gib`: of a GPU; `choices`: the averages."""

    title: str
    gib: float
    host: float
    host_exchange: float
    kernels: Kernels
    links: tuple[Link, ...]
    choices: Machine
    sources: Mapping[str, str]
    devices: tuple[str, ...] = ()
    graphs: bool = True

    def __post_init__(self) -> None:
        if self.gib <= 0 or min(self.host, self.host_exchange) < 0:
            raise ValueError(
                f"gib = {self.gib!r}, host = {self.host!r}, host_exchange = {self.host_exchange!r}: "
                "expected a positive number, and two that are not negative"
            )
        reach = [link.ranks for link in self.links]
        if not reach or reach != sorted(set(reach)):
            raise ValueError(f"links have ranks = {reach}: expected one at least, each with more than the one before")


def _read(name: str, data: Mapping[str, Any]) -> Hardware:
    file = read(_File, data)
    figures = {field: getattr(file, field) for field in ("title", "kernels", "links", "host", "host_exchange")}
    rest = {field: getattr(file, field) for field in ("graphs", "devices", "sources")}
    return Hardware(name=name, memory=file.gib * GIB, machine=file.choices, **figures, **rest)

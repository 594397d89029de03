"""How a mesh is spread over hosts: which of its dims lead from one to another, where links are slow."""

from __future__ import annotations

import itertools
import math
import platform
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from xdit_ir.ir.mesh import RING, ULYSSES, Mesh

KEY = "xdit_ir/host"


def host() -> str:
    """By what this process tells its host from others: the name that the system gives it, which every container or UTS
    namespace has of its own (`unshare --uts`, then `hostname NAME`)."""
    return platform.node()


def exchanged(store: Any, rank: int, world: int) -> tuple[str, ...]:
    """The host of every process of a job. Collective."""
    store.set(f"{KEY}/{rank}", host())
    return tuple(store.get(f"{KEY}/{other}").decode() for other in range(world))


def near(hosts: Sequence[Hashable]) -> int:
    """How many successive processes are on one host, everywhere."""
    runs = [len(list(run)) for _, run in itertools.groupby(hosts)]
    return math.gcd(*runs)


def crossing(mesh: Mesh, hosts: Sequence[Hashable]) -> tuple[str, ...]:
    """The mesh dims along which ranks on different hosts meet; `hosts`: of every process, one replica behind the
    other."""
    size = mesh.world_size
    replicas = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    return tuple(
        name
        for name in mesh.names
        if any(
            len({one[member] for member in mesh.group(rank, (name,))}) > 1 for one in replicas for rank in range(size)
        )
    )


def told(mesh: Mesh, hosts: Sequence[Hashable]) -> str:
    """The same in a sentence, with degrees that would do better; empty for one host."""
    there = Counter(hosts)
    if len(there) < 2:
        return ""
    across = crossing(mesh, hosts)
    inside = [name for name, size in mesh.degrees.items() if size > 1 and name not in across]
    parts = [f"{_listed(mesh, across)} between them" if across else "no exchange of a request between them"]
    parts += [f"{_listed(mesh, inside)} inside them"] if inside else []
    return f"{len(there)} hosts: {', '.join(parts)}{_better(mesh, across, near(hosts))}"


def _listed(mesh: Mesh, names: Sequence[str]) -> str:
    return " x ".join(f"{name}={mesh.degrees[name]}" for name in names)


def _better(mesh: Mesh, across: Sequence[str], here: int) -> str:
    """Where tokens are exchanged for heads between hosts: the same with keys that travel there."""
    kept = math.gcd(mesh.degrees[ULYSSES], here)
    if ULYSSES not in across or kept == 1:
        return ""
    rest = mesh.degrees[RING] * mesh.degrees[ULYSSES] // kept
    return f"; {RING}={rest} x {ULYSSES}={kept} would keep what waits in every block inside"

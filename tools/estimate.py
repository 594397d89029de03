"""`bench --scale --estimate`: what several ways to use many GPUs take, worked out from sizes, without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.degrees import Degrees
from xdit_ir.errors import ParallelizeError, XditError
from xdit_ir.ir.mesh import TIME
from xdit_ir.planning.estimate import estimate
from xdit_ir.planning.hardware import Hardware
from xdit_ir.tools.bench_report import markdown_table

# Models, and how often a step of their pipelines calls them.
CALLS = {"flux.2-dev": 1, "qwen-image": 2, "wan2.1-t2v-14b:720p": 2}
# GPUs of a node, over which Ulysses reaches where other degrees reach over nodes.
NODE = 8
FEWEST = 4
HEADER = ("GPUs", "degrees", "ms a call", "of them waiting", "GiB", "exchanges", "between nodes", "why not")
PAGE = """# Scaling, worked out

Generated; do not edit:

    {command}

**Nothing is measured**: times follow from sizes and from what a machine can do, by the cost model of
[plans](planning.md), so they show which degrees are worth a try. Machine: {machine}.
Links: {sources}.

For each model first the milliseconds of a step, the least in bold: `ulysses` over all GPUs; `ring` over nodes with
Ulysses inside (two halves where there is one node); `pipefusion`, a displaced step (results differ slightly), with
stages on different nodes (two where there is one) and Ulysses inside; `cfg first`: where a step calls the model twice,
each half of the GPUs runs one of the calls, the faster of `ulysses` and `ring` on that half; the others run both calls
one after the other (the exchange of results at the end of a step is left out). Then a call under each set of degrees.
`all_to_all` is of Ulysses, `ring_attention` of Ring; `gather` is of keys and values, which passes choose where there
are fewer heads than ranks, or of conditions and results. `halo_exchange` is of queries, keys and values of attention in
tiles, the results of which are a part of `all_to_all`: passes choose it where it takes less than a ring or gathered
keys, so a row whose degrees have a ring may have none. A cell takes half a minute of a processor, and some minutes
where the sequence is long; what is empty was not worked out: `--gpus 64` does it, and keeps what is in the folder.
"""


@dataclass(frozen=True)
class DegreesEstimate:
    """One way to use `gpus` GPUs: milliseconds of a call (under PipeFusion of a displaced one) and of waiting in it,
    GiB of the fullest rank, MiB that a rank sends by kind of exchange, the mesh dims between nodes."""

    gpus: int
    degrees: str
    ms: float = 0.0
    waiting: float = 0.0
    gib: float = 0.0
    exchanges: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    refusal: str = ""

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of `HEADER`."""
        if self.refusal:
            return (str(self.gpus), self.degrees, *[""] * 5, self.refusal)
        numbers = f"{self.ms:.1f}", f"{self.waiting:.1f}", f"{self.gib:.1f}"
        return (str(self.gpus), self.degrees, *numbers, ", ".join(self.exchanges), ", ".join(self.between), "")


def families(gpus: int) -> dict[str, Degrees]:
    """The ways that are compared, by name."""
    nodes = max(gpus // NODE, 2)
    return {
        "ulysses": Degrees.of(ulysses=gpus),
        "ring": Degrees.of(ring=nodes, ulysses=gpus // nodes),
        "pipefusion": Degrees.of(pipefusion=nodes, ulysses=gpus // nodes, patches=max(nodes, 4)),
    }


def exact_families(gpus: int) -> dict[str, Degrees]:
    """Those of them that compute what one GPU does."""
    return {name: one for name, one in families(gpus).items() if one.mesh.degrees[TIME] == 1}


def counts(gpus: int) -> list[int]:
    """Powers of two from `FEWEST` up to `gpus`."""
    found = [1 << power for power in range(2, gpus.bit_length())]
    if gpus not in found:
        raise XditError(f"--gpus {gpus}: estimates go through powers of two, {FEWEST} or more")
    return found


def worked_out(name: str, gpus: int, hardware: Hardware, folder: Path | None = None) -> list[DegreesEstimate]:
    """All rows for a full-size model up to so many GPUs, and what else is in the folder; what is there is not worked
    out again, and each new one is written at once."""
    path = None if folder is None else folder / f"{name.replace(':', '-')}.json"
    rows = {(row.gpus, row.degrees): row for row in ([] if path is None else _read(path, hardware))}
    halves = [FEWEST // 2] if CALLS.get(name, 1) > 1 else []
    wanted = [(1, Degrees())] + [(count, one) for count in halves for one in exact_families(count).values()]
    wanted += [(count, one) for count in counts(gpus) for one in families(count).values()]
    missing = [(count, one) for count, one in wanted if (count, str(one)) not in rows]
    if missing:
        model, example = models.load(name, device="meta", dtype=torch.bfloat16)
        traced = TracedProgram(xir.trace(model, example).ir, familiar=True)
        for count, one in missing:
            rows[count, str(one)] = _row(count, one, traced, hardware)
            if path is not None:
                _write(path, hardware, list(rows.values()))
    return sorted(rows.values(), key=lambda row: row.gpus)


def _write(path: Path, hardware: Hardware, rows: Sequence[DegreesEstimate]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"machine": hardware.name, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read(path: Path, hardware: Hardware) -> list[DegreesEstimate]:
    if not path.exists():
        return []
    data = json.loads(path.read_text("utf-8"))
    if data["machine"] != hardware.name:
        raise XditError(f"{path} is of {data['machine']}, not of {hardware.name}: give another folder by --out")
    tuples = ({**row, "exchanges": tuple(row["exchanges"]), "between": tuple(row["between"])} for row in data["rows"])
    return [DegreesEstimate(**row) for row in tuples]


def _row(gpus: int, degrees: Degrees, traced: TracedProgram, hardware: Hardware) -> DegreesEstimate:
    try:
        parallel = traced.parallelize(**degrees.as_dict(), machine=hardware.prices)
    except ParallelizeError as error:
        return DegreesEstimate(gpus, str(degrees), refusal=str(error))
    found, sent = estimate(parallel, hardware), dict[str, float]()
    for one in parallel.report().collectives:
        sent[one.kind] = sent.get(one.kind, 0.0) + one.bytes_per_rank / 2**20
    exchanges = tuple(f"{kind} {amount:.0f} MiB" for kind, amount in sent.items() if amount >= 1)
    between = hardware.between(degrees.mesh)
    return DegreesEstimate(gpus, str(degrees), found.ms, found.parts.exchanges, max(found.gib), exchanges, between)


def summary(rows: Sequence[DegreesEstimate], calls: int) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Milliseconds of a step by GPUs and family, and the speed-up of the least."""
    ms = {(row.gpus, row.degrees): row.ms for row in rows if not row.refusal}
    alone = calls * ms[1, str(Degrees())]
    names = (*families(FEWEST), *(("cfg first",) if calls > 1 else ()))
    lines = []
    for gpus in sorted({row.gpus for row in rows if row.gpus >= FEWEST}):
        taken = {name: calls * ms[gpus, str(one)] for name, one in families(gpus).items() if (gpus, str(one)) in ms}
        halves = exact_families(gpus // calls).values() if calls > 1 else ()
        half = [ms.get((gpus // calls, str(one)), 0.0) for one in halves]
        taken |= {"cfg first": min(half)} if half and all(half) else {}
        least = min(taken, key=lambda name: taken[name])
        cells = (f"{taken[name]:.1f}" if name in taken else "" for name in names)
        bold = (f"**{cell}**" if name == least else cell for name, cell in zip(names, cells, strict=True))
        lines.append((str(gpus), *bold, f"{alone / taken[least]:.1f}"))
    return ("GPUs", *names, "speed-up"), lines


def page(tables: Sequence[tuple[str, Sequence[DegreesEstimate]]], hardware: Hardware, command: str) -> str:
    """A Markdown page of models with their rows."""
    sources = hardware.sources.get("links", "plain speeds")
    lines = [PAGE.format(machine=hardware, command=command, sources=sources)]
    for name, rows in tables:
        calls = CALLS.get(name, 1)
        header, steps = summary(rows, calls)
        what = "one call" if calls == 1 else f"{calls} calls"
        alone = calls * next(row.ms for row in rows if row.gpus == 1)
        lines += [f"## {name}", "", f"A step has {what}; one GPU takes {alone:.0f} ms.", ""]
        lines += [*markdown_table(header, steps), ""]
        lines += [*markdown_table(HEADER, [row.cells() for row in rows]), ""]
    return "\n".join(lines)

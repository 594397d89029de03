"""`bench --scale`: the same models on 2, 4, 8, ... GPUs, under every way to use them, and how the speed-up grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdit_ir.degrees import Degrees
from xdit_ir.errors import XditError
from xdit_ir.tools.bench_report import BASE, empty_figure

MODELS = ("flux.1-dev", "flux.1-dev:2048px", "wan2.1-t2v-14b")
Document = Mapping[str, Any]


def counts(gpus: int) -> list[int]:
    """Powers of two from 2 up to `gpus`.

    Raises:
        XditError: `gpus` is no power of two, or 1.
    """
    found = [1 << power for power in range(1, gpus.bit_length()) if 1 << power <= gpus]
    if gpus not in found:
        raise XditError(f"--scale goes through powers of two: --gpus {gpus} is none; nearest: {(found or [2])[-1]}")
    return found


def degree_sets(gpus: int) -> list[Degrees]:
    """Ulysses, Ring and hybrids, halves of `cfg`, and pipelines with as many patches as stages, and twice as many."""
    found = [Degrees.of(ulysses=gpus), Degrees.of(ring=gpus)]
    if gpus > 2:
        found += [Degrees.of(ulysses=gpus // 2, ring=2), Degrees.of(cfg=2, ulysses=gpus // 2)]
    for stages in (2, 4, gpus):
        if stages <= gpus:
            found += [Degrees.of(pipefusion=stages, ulysses=gpus // stages, patches=m) for m in (stages, 2 * stages)]
    return list(dict.fromkeys(found))


def contenders(gpus: int) -> list[str]:
    """One compiled GPU, ours, and the other libraries, last since they change the model."""
    ours = [f"{degrees}:graph" for degrees in degree_sets(gpus)]
    return [BASE, *ours, f"xdit-u{gpus}:compiled", f"diffusers-u{gpus}:compiled"]


def speed_ups(documents: Sequence[Document]) -> dict[str, dict[str, dict[int, float]]]:
    """Per model and kind of contender (its letters, such as `u` or `pu`): the best speed-up for each count of GPUs."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for document in documents:
        medians = {each["contender"]: each["median_ms"] for each in document["results"] if "median_ms" in each}
        for name, median in medians.items():
            if name != BASE and BASE in medians:
                kind = found.setdefault(document["model"], {}).setdefault(_kind(name), {})
                kind[document["ranks"]] = max(kind.get(document["ranks"], 0.0), medians[BASE] / median)
    return found


def _kind(contender: str) -> str:
    """What it is but for the numbers: `p2u2m4:graph` and `p4u2m4:graph` are both `pu`."""
    library, _, degrees = contender.partition(":")[0].rpartition("-")
    letters = "".join(letter for letter in degrees if letter.isalpha()).replace("m", "")
    return f"{library}-{letters}" if library else letters


def plot(documents: Sequence[Document], path: Path) -> None:
    """Speed-up over one compiled GPU against GPUs, a panel per model, with the line that nothing can pass."""
    models = speed_ups(documents)
    figure = empty_figure(0.6 + 4.2 * len(models), 4)
    for axis, (model, kinds) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        most = max(max(points) for points in kinds.values())
        axis.plot([1, most], [1, most], color="tab:gray", linestyle=":", label="ideal")
        for kind, points in sorted(kinds.items()):
            shown = {1: 1.0} | points
            axis.plot(list(shown), list(shown.values()), "--o" if "-" in kind else "-o", label=kind)
        axis.set(title=model, xlabel="GPUs", ylabel="speed-up over one compiled GPU")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="svg")

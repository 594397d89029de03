"""The page about images of PipeFusion and of step caches, and its plot, made from what `quality` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdit_ir.tools.bench_report import empty_figure

Result = Mapping[str, Any]
Document = Mapping[str, Any]
CENTRE: Mapping[str, int] = {"steps": 20, "patches": 4, "warmup_steps": 1}
NAMES: Mapping[str, str] = {"warmup_steps": "warmup steps", "patches": "patches", "steps": "denoising steps"}

PAGE = """# What PipeFusion and step caches do to images

Never edited by hand; made, in a minute of one GPU, by

    python -m xdit_ir.tools.quality --output benchmarks/quality/digits.json --page docs/quality.md

After its warmup steps PipeFusion attends to keys and values that are one step old, so that its images differ from the
exact ones. How much is measured on the digits model (`models/digits`: a class-conditional latent DiT with 256 image
tokens and six blocks, in the unmodified `DiTPipeline`), in the exact semantics of {stages} stages, simulated in one
process: {images} images for each row ({device}, float32, guidance {guidance}), always the same latents and classes.
"Relative difference" is that of all images to the exact ones in the Frobenius norm; "recognised" is the share of images
in which the classifier of `models/digits` sees the digit that was asked for.

{table}

![difference and accuracy](quality.svg)

One patch is exact: every step sees its own keys and values only. {claim}
{dtypes}{caches}"""
DTYPES = """
## Stale keys and values in fewer bits

The same for `kv_cache_dtype` of `parallelize` and `port` ({images} images for each row, {device}): "rounding" is the
difference to the images of the model's own dtype (the first row). `--from benchmarks/quality/digits.json --dtypes
--images {images}` measures these rows alone.

{table}
"""
CACHES = """
## Step caches

The same for [step caches](caching.md) ({images} images for each row, {device}): steps that leave blocks out add what
these added when they were computed last. `--from benchmarks/quality/digits.json --caches --images {images}` measures
these rows alone.

{table}

The last panel above: against the share of steps that left blocks out, at {steps} steps.
"""


def series(document: Document, name: str) -> list[Result]:
    """The results where only `name` differs from (20 steps, 4 patches, 1 warmup step), in its order."""
    others = [(key, value) for key, value in CENTRE.items() if key != name]
    found = [one for one in document["results"] if all(one[key] == value for key, value in others)]
    return sorted(found, key=lambda one: int(one[name]))


def table(document: Document) -> str:
    """One row a setting, in Markdown."""
    head = [
        "steps",
        "patches",
        "warmup steps",
        "relative difference",
        "largest (of 1)",
        "recognised",
        "recognised, exact",
    ]
    lines = [head, ["---"] * len(head), *(_row(one) for one in _ordered(document))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cache_table(caches: Document) -> str:
    """One row a step cache, in Markdown."""
    counts = ["steps", "cache", "without the blocks"]
    head = [*counts, "relative difference", "largest (of 1)", "recognised", "recognised, exact"]
    rows = [[str(one["steps"]), f"`{one['cache']}`", str(one["skipped"]), *_measures(one)] for one in caches["results"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def dtype_table(dtypes: Document) -> str:
    """One row a dtype of stale keys and values, in Markdown."""
    head = ["steps", "patches", "kv_cache_dtype", "MiB of buffers", "relative difference", "rounding", "recognised"]
    rows = [
        [
            *(str(one["steps"]), str(one["patches"]), f"`{one['dtype']}`", f"{one['mib']:.1f}"),
            *(f"{one['difference']:.2e}", f"{one['rounding']:.2e}", f"{one['accuracy']:.1%}"),
        ]
        for one in dtypes["results"]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _ordered(document: Document) -> Sequence[Result]:
    return sorted(document["results"], key=lambda one: (one["steps"], one["warmup_steps"], one["patches"]))


def _row(one: Result) -> list[str]:
    return [*(str(one[name]) for name in CENTRE), *_measures(one)]


def _measures(one: Result) -> list[str]:
    return [
        f"{one['difference']:.2e}",
        f"{one['largest']:.2f}",
        f"{one['accuracy']:.1%}",
        f"{one['exact_accuracy']:.1%}",
    ]


def _claim(document: Document) -> str:
    centre = next(one for one in document["results"] if all(one[name] == value for name, value in CENTRE.items()))
    lost = 100 * (centre["exact_accuracy"] - centre["accuracy"])
    return (
        f"With 1 warmup step and 4 patches at 20 steps, accuracy is {lost:+.1f} points below that of the exact images "
        f"at a relative difference of {centre['difference']:.3f}."
    ).replace("+0.0 points below", "0.0 points below")


def write(document: Document, page: Path) -> None:
    """The page, and `quality.svg` beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    values = {name: document[name] for name in ("images", "device", "guidance", "stages")}
    caches = ""
    if measured := document.get("caches"):
        named = {"images": measured["images"], "device": measured["device"], "steps": CENTRE["steps"]}
        caches = CACHES.format(**named, table=cache_table(measured))
    dtypes = ""
    if measured := document.get("dtypes"):
        dtypes = DTYPES.format(**measured, table=dtype_table(measured))
    told = {"claim": _claim(document), "dtypes": dtypes, "caches": caches}
    page.write_text(PAGE.format(**values, table=table(document), **told))
    plot(document, page.with_name("quality.svg"))


def plot(document: Document, path: Path) -> None:
    """Difference (left) and accuracy (right) by warmup steps, patches, denoising steps, and what caches leave out."""
    caches = document.get("caches", {}).get("results", ())
    figure = empty_figure(12.6 + 4.2 * bool(caches), 3.6)
    first, *axes = figure.subplots(1, len(NAMES) + bool(caches))
    for axis, (name, label) in zip([first, *axes], NAMES.items(), strict=False):
        found = series(document, name)
        at = [one[name] for one in found]
        right = _two_scales(axis, label)
        axis.set(xscale="log", xticks=at, xticklabels=at)
        axis.minorticks_off()
        _draw(axis, right, at, found)
    if caches:
        found = [one for one in caches if one["steps"] == CENTRE["steps"]]
        right = _two_scales(axes[-1], "without the blocks (%): \u25cb first-block, \u25b3 every, + steps")
        for kind, marker in (("first-block", "o"), ("every", "^"), ("steps", "+")):
            of_kind = [one for one in found if one["cache"].startswith(kind)]
            _draw(axes[-1], right, [100 * one["skipped"] / one["steps"] for one in of_kind], of_kind, marker, marker)
    for axis in (first, *axes):
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, format="svg")


def _two_scales(axis: Any, label: str) -> Any:
    """Names the axes of a panel; its right one."""
    axis.set(xlabel=label, ylabel="relative difference")
    axis.yaxis.label.set_color("tab:blue")
    right = axis.twinx()
    right.set(ylabel="recognised", ylim=(0.9, 1.003))
    right.yaxis.label.set_color("tab:orange")
    return right


def _draw(
    axis: Any, right: Any, at: Sequence[float], found: Sequence[Result], left_mark: str = "-o", mark: str = "--s"
) -> None:
    axis.plot(at, [one["difference"] for one in found], left_mark, color="tab:blue")
    right.plot(at, [one["accuracy"] for one in found], mark, color="tab:orange")

"""The text of docs/support.md, from surveys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xdit_ir import models
from xdit_ir.tools.survey import TOLERANCE, Outcome, Survey

SHOWN = ("c2", "u4", "r2", "r2u2")
BALANCED, WIDEST = 0.30, "u4"
PARTS_SHOWN = {"u2": 0.54, "u4": BALANCED}  # with the share that the slowest rank may have
HEAD = """# What is supported

Made by `xdit-ir support --output docs/support.md`, not edited by hand: every model of the zoo in its tiny size (a few
narrow layers of every kind, 256 image or video tokens or a little more, random weights, float32), all ranks simulated
and compared with the model.

`c` is CFG parallelism (the batch), `u` Ulysses, `r` Ring, `r2u2` a hybrid of both on four ranks. *Exact*: the largest
relative error of any output on any rank under {degrees}; a model that *rounds inside* to less
than float32 may differ by what that costs itself, compared with float64. A cell says which part of one device's FLOPs
the slowest rank does, what all ranks do together, for how many operators something was gathered, in blocks or before
them (keys of an attention and the outputs aside), and MiB sent by the busiest rank in a forward. *Gathers in blocks*
counts every gather in the block bodies at {widest}, those of keys and values too. In tiny models text and fixed parts
weigh more than in the real ones.
"""


ON_GPUS = """
*On GPUs*: under which degrees the tiny model, ported in the default mode, has given on real GPUs what it gives alone,
as `tests/gpu/zoo.py` says (`--gpu FILE`).
"""


def page(everything: Sequence[Survey], on_gpus: Sequence[Mapping[str, Any]] = ()) -> str:
    """Markdown: a summary, the table, and every reason behind a number that is not what one would like.

    `on_gpus`: what `tests/gpu/zoo.py` has written, which is a column of its own.
    """
    surveys, parts = ([one for one in everything if (" " in one.name) == part] for part in (False, True))
    captured = [one for one in surveys if not one.not_captured]
    degrees = ", ".join(outcome.degrees for outcome in captured[0].outcomes) if captured else "no degrees"
    return "\n".join(
        [
            HEAD.format(degrees=degrees, widest=WIDEST) + (ON_GPUS if on_gpus else ""),
            *_summary(surveys),
            *([_gpu_summary(on_gpus)] if on_gpus else []),
            "",
            f"| model | class | exact | {'on GPUs | ' if on_gpus else ''}gathers in blocks | {' | '.join(SHOWN)} |",
            "|---" * (4 + len(SHOWN) + bool(on_gpus)) + "|",
            *(_row(one, on_gpus) for one in surveys),
            *_reasons("Not captured", "Each is a `TraceError` that says:", _not_captured(surveys)),
            *_reasons("Refused", "Each is a `ParallelizeError` that says:", _refused(captured)),
            *_reasons(f"Slowest rank above {BALANCED:.2f} at {WIDEST}", "Slowest rank, all ranks:", _uneven(captured)),
            *_reasons(
                f"Gathered inside blocks at {WIDEST}",
                "Every gather, by what it is for, and where:",
                _gathered(captured),
            ),
            *_reasons(f"Other fallbacks at {WIDEST}", "Operator, place, reason:", _fallbacks(captured)),
            *_reasons(
                "No denoisers", "In the zoo because diffusers exports them as transformers:", _no_denoisers(surveys)
            ),
            *_reasons("Refused on GPUs, or not as alone", "As the run says:", _gpu_reasons(on_gpus)),
            *_of_parts(parts),
        ]
    )


def _gpu_summary(on_gpus: Sequence[Mapping[str, Any]]) -> str:
    ran = [one for one in on_gpus if one["status"] != "refused"]
    equal = sum(one["status"] == "equal" for one in ran)
    return f"* {equal} of {len(ran)} runs on GPUs equal to the model alone; {len(on_gpus) - len(ran)} refused."


def _on_gpus(name: str, on_gpus: Sequence[Mapping[str, Any]]) -> str:
    """The degrees by what became of them."""
    found: dict[str, list[str]] = {}
    for one in sorted(on_gpus, key=lambda one: str(one["degrees"])):
        if one["model"] == name:
            found.setdefault(one["status"], []).append(one["degrees"])
    good = " ".join(found.pop("equal", []))
    rest = (
        f"{' '.join(which)} {'refused' if status == 'refused' else f'**{status}**'}" for status, which in found.items()
    )
    return ", ".join(filter(None, (good, *rest))) or "-"


def _gpu_reasons(on_gpus: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for one in on_gpus:
        if one["status"] != "equal":
            why = one.get("reason") or f"differs by {one['error']:.1e}"
            yield f"* {one['model']}, {one['degrees']}: {_line(why)}"


def _of_parts(parts: Sequence[Survey]) -> list[str]:
    """The decoders and encoders, under Ulysses: rows, frames or tokens are divided."""
    if not parts:
        return []
    done = [one.outcome(degrees) for one in parts if not one.not_captured for degrees in PARTS_SHOWN]
    drawn = sum(math.isnan(outcome.error) for outcome in done)
    exact = sum(outcome.exact for outcome in done)
    return [
        "",
        "## Decoders and encoders",
        "",
        "Calls that pipelines make, in tiny size, with 32 rows of latents where it has rows; cells as above.",
        "",
        f"* {len(parts)} calls, {sum(not one.not_captured for one in parts)} captured; {exact} of {len(done) - drawn} "
        f"simulations within {TOLERANCE:.0e}; {drawn} draw noise and are not compared.",
        *(f"* {_shared(parts, degrees, bound)}" for degrees, bound in PARTS_SHOWN.items()),
        "",
        f"| part | class | exact | {' | '.join(PARTS_SHOWN)} |",
        "|---" * (3 + len(PARTS_SHOWN)) + "|",
        *(_part_row(one) for one in parts),
        *_reasons("Parts not captured", "Each is a `TraceError` that says:", _not_captured(parts)),
    ]


def _shared(parts: Sequence[Survey], degrees: str, bound: float) -> str:
    found = [one for one in (_found(part, degrees) for part in parts) if one is not None and not one.refused]
    shared = sum(one.slowest <= bound for one in found)
    return f"{shared} of {len(parts)}: slowest rank at most {bound:.2f} of the FLOPs at {degrees}."


def _part_row(one: Survey) -> str:
    cells = [one.name, f"`{models.part(one.name.split()[0]).cls}`", _exactness(one)]
    return f"| {' | '.join([*cells, *(_cell(_found(one, degrees)) for degrees in PARTS_SHOWN)])} |"


def _summary(surveys: Sequence[Survey]) -> Iterator[str]:
    captured = [one for one in surveys if not one.not_captured]
    run = [outcome for one in captured for outcome in one.outcomes if not outcome.refused]
    widest = [found for one in captured for found in [_found(one, WIDEST)] if found is not None and not found.refused]
    balanced = sum(outcome.slowest <= BALANCED for outcome in widest)
    local = sum(not outcome.gathers for outcome in widest)
    keys = sum(not outcome.gathered for outcome in widest)
    yield f"* {len(captured)} of {len(surveys)} models captured."
    yield f"* {sum(one.exact for one in run)} of {len(run)} simulations within {TOLERANCE:.0e} of the model."
    yield f"* {balanced} of {len(surveys)} models: slowest rank at most {BALANCED:.2f} of the FLOPs at {WIDEST}."
    yield f"* {local} of {len(surveys)} models: nothing gathered inside a block at {WIDEST}."
    what = "nothing gathered for an operator but keys and values of attention"
    yield f"* {keys} of {len(surveys)} models: {what} at {WIDEST}."


def _row(one: Survey, on_gpus: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        one.name,
        f"`{models.entry(one.name).cls.rpartition(':')[2]}`",
        _exactness(one),
        *([_on_gpus(one.name, on_gpus)] if on_gpus else []),
        _gathers(_found(one, WIDEST)),
    ]
    return f"| {' | '.join([*cells, *(_cell(_found(one, degrees)) for degrees in SHOWN)])} |"


def _gathers(outcome: Outcome | None) -> str:
    return "-" if outcome is None or outcome.refused else str(len(outcome.gathers))


def _found(one: Survey, degrees: str) -> Outcome | None:
    return next((outcome for outcome in one.outcomes if outcome.degrees == degrees), None)


def _exactness(one: Survey) -> str:
    """A bound, not the error itself, which differs between machines."""
    run = [outcome for outcome in one.outcomes if not outcome.refused]
    if not run:
        return "not captured" if one.not_captured else "refused"
    if any(math.isnan(outcome.error) for outcome in run):
        return "draws noise"
    worst = max(outcome.error for outcome in run)
    bounds = [bound for bound in (1e-6, TOLERANCE) if worst <= bound]
    if bounds:
        return f"≤ {bounds[0]:.0e}"
    return f"{worst:.0e}, rounds inside" if all(outcome.exact for outcome in run) else f"**{worst:.0e}**"


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "-"
    if outcome.refused:
        return "refused"
    gathers = f"{len(outcome.gathered)} gathered"
    return f"{outcome.slowest:.3f}, {outcome.work:.2f}, {gathers}, {outcome.bytes / 2**20:.2f} MiB"


def _reasons(title: str, intro: str, lines: Iterable[str]) -> list[str]:
    listed = list(lines)
    return ["", f"## {title}", intro, "", *listed] if listed else []


def _not_captured(surveys: Sequence[Survey]) -> Iterator[str]:
    yield from (f"* {one.name}: {_line(one.not_captured)}" for one in surveys if one.not_captured)


def _refused(surveys: Sequence[Survey]) -> Iterator[str]:
    for one in surveys:
        by_reason: dict[str, list[str]] = {}
        for outcome in one.outcomes:
            if outcome.refused:
                by_reason.setdefault(_line(outcome.refused), []).append(outcome.degrees)
        yield from (f"* {one.name}, {', '.join(which)}: {reason}" for reason, which in by_reason.items())


def _uneven(surveys: Sequence[Survey]) -> Iterator[str]:
    for one in surveys:
        outcome = _found(one, WIDEST)
        if outcome is not None and not outcome.refused and outcome.slowest > BALANCED:
            yield f"* {one.name}: {outcome.slowest:.3f}, {outcome.work:.2f}"


def _gathered(surveys: Sequence[Survey]) -> Iterator[str]:
    for one in surveys:
        outcome = _found(one, WIDEST)
        if outcome is not None:
            yield from _grouped(one.name, outcome.gathers)


def _grouped(name: str, places: Sequence[str]) -> Iterator[str]:
    """One line for each operator, with its first place."""
    by_operator: dict[str, list[str]] = {}
    for place in places:
        by_operator.setdefault(place.partition(":")[0].partition(",")[0], []).append(place)
    for found in by_operator.values():
        yield f"* {name}: {_line(found[0])}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


def _fallbacks(surveys: Sequence[Survey]) -> Iterator[str]:
    for one in surveys:
        outcome = _found(one, WIDEST)
        if outcome is not None:
            yield from _grouped(one.name, [what for what in outcome.fallbacks if what not in outcome.gathered])


def _no_denoisers(surveys: Sequence[Survey]) -> Iterator[str]:
    for one in surveys:
        reason = models.entry(one.name).no_denoiser
        if reason:
            yield f"* {one.name}: {reason}"


def _line(text: str) -> str:
    """One line that Markdown leaves as it is."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"

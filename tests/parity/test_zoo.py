"""The promise, on every model of the zoo: each rank's output is the model's, work is divided, blocks stay local.

What is captured is right for other inputs and weights, too.
The first model of every fourth class, and those of the tables, run under one set of degrees in rotation, and the work
of a third of them is looked at over four Ulysses ranks; `--zoo-all` runs all models under all sets. Those of
`test_simulated.py` run there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_simulated import MODELS as SIMULATED
from torch.utils._pytree import tree_map

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.effects import copied
from xdit_ir.capture.objects import expand_objects
from xdit_ir.degrees import Degrees
from xdit_ir.ir.difference import relative_error, tensors_of
from xdit_ir.simulation.examples import run_single
from xdit_ir.tools.survey import DEGREES, Outcome, Subject

# The tables of what is not as it should be. A model that no longer belongs into one fails.
# What cannot be captured yet: the error names the operator, the input or the value that the model reads.
NOT_CAPTURED: dict[str, str] = {}
# What is captured but cannot be divided like this, by model and letter of the degree: what the error says.
REFUSED = {
    ("cosmos3-omni", "c"): "batch of 1",
}
# Where the slowest of four Ulysses ranks does more than this part of the FLOPs.
BALANCED = 0.30
UNEVEN: dict[str, str] = {}
# Where anything is gathered inside a block, be it the keys of an attention.
GATHERED = {
    "kandinsky-6": "video attends to the audio stream of every block, too short for Ulysses",
    "ltx-2": "audio, too short to be divided, attends to the video of every block",
    "ltx-2.3": "audio, too short to be divided, attends to the video of every block",
    "motif-video": "the image attends once more to the text stream of every block, too short for Ulysses",
    "nucleus-image": "each expert takes its best tokens of the whole image",
    "rfd4-proteina": "triangle updates multiply pairs of residues over both dimensions",
}

NAMES = models.names()
CAPTURED = [name for name in NAMES if name not in NOT_CAPTURED]
WIDEST = Degrees.of(ulysses=4)


def first_of_classes() -> list[str]:
    """The models that run without `--zoo-all`."""
    classes: dict[str, str] = {}
    for name in CAPTURED:
        classes.setdefault(models.entry(name).cls, name)
    firsts = [name for name in classes.values() if name not in SIMULATED]
    return [name for at, name in enumerate(firsts) if at % 4 == 2 or name in {*UNEVEN, *GATHERED}]


FEW = first_of_classes()


def rotation(name: str, *, everything: bool) -> list[Degrees]:
    """The sets of degrees that a model runs under."""
    return list(DEGREES) if everything else [DEGREES[FEW.index(name) % len(DEGREES)]]


def is_priced(name: str, *, everything: bool) -> bool:
    """Whether the work over the most ranks is looked at; where a model runs there, it costs nothing more."""
    if refusal(name, WIDEST) is not None:
        return False
    return everything or name in {*UNEVEN, *GATHERED} or FEW.index(name) % 3 == DEGREES.index(WIDEST) % 3


def refusal(name: str, degrees: Degrees) -> str | None:
    """What the refusal says, if this is refused."""
    return next((why for (model, letter), why in REFUSED.items() if model == name and letter in str(degrees)), None)


def judge(name: str, degrees: Degrees, outcome: Outcome) -> None:
    """Assert that an outcome is good, or bad as the tables say."""
    expected = refusal(name, degrees)
    if expected is not None:
        assert expected in outcome.refused, f"{degrees} is no longer refused"
        return
    assert not outcome.refused
    assert outcome.exact, f"{degrees}: relative error {outcome.error:.1e}"


def judge_price(name: str, outcome: Outcome) -> None:
    """Assert that the work is divided and nothing gathered, or not, as the tables say."""
    assert (outcome.slowest > BALANCED) == (name in UNEVEN), f"slowest rank {outcome.slowest:.3f}"
    assert bool(outcome.gathers) == (name in GATHERED), f"gathered: {outcome.gathers}"


def left(example: dict[str, Any], run: Callable[[dict[str, Any]], Any]) -> list[torch.Tensor]:
    """The tensors of an output, and those in what the model was given, after a run on a copy of the example."""
    given = copied(example)
    return tensors_of(run(given)) + [
        x for x in tensors_of(expand_objects(given)) if not any(x is item for item in given.values())
    ]


def right_elsewhere(subject: Subject) -> None:
    """Assert that the captured program is the module's on other latents, text, timesteps and weights, too."""
    model, other = models.load(f"{subject.name}:tiny", seed=7)

    def fresh(before: Any, after: Any) -> Any:
        return after if isinstance(after, torch.Tensor) and after.is_floating_point() else before

    example = tree_map(fresh, subject.example, other)
    with torch.no_grad():
        expected = left(example, lambda given: model(**given))
        before = left(subject.example, lambda given: subject.model(**given))
    assert relative_error(before, expected) > 0.1
    assert relative_error(left(example, lambda given: run_single(subject.traced.ir, model, given)), expected) <= 1e-6


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "captured" in metafunc.fixturenames:
        metafunc.parametrize("captured", CAPTURED if metafunc.config.getoption("--zoo-all") else FEW)


def test_exact_balanced_and_local(captured: str, pytestconfig: pytest.Config) -> None:
    subject, everything = Subject(captured), pytestconfig.getoption("--zoo-all")
    right_elsewhere(subject)
    outcomes = {one: subject.outcome(one) for one in rotation(captured, everything=everything)}
    for degrees, outcome in outcomes.items():
        judge(captured, degrees, outcome)
    if is_priced(captured, everything=everything):
        judge_price(captured, outcomes.get(WIDEST) or subject.outcome(WIDEST, run=False))


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(xir.TraceError, match=NOT_CAPTURED[name]):
        xir.trace(*models.load(f"{name}:tiny"))


def test_the_rotation_covers_every_set_of_degrees() -> None:
    for one in DEGREES:
        assert sum(one in rotation(name, everything=False) for name in FEW) >= len(FEW) // len(DEGREES)


def test_tables_name_models_of_the_zoo() -> None:
    assert {*UNEVEN, *GATHERED, *NOT_CAPTURED, *(name for name, _ in REFUSED)} <= set(NAMES)


def undivided() -> set[str]:
    return {*NOT_CAPTURED, *(name for name, letter in REFUSED if letter == "u")}


def test_at_least_95_percent_are_balanced() -> None:
    assert len(undivided().union(UNEVEN)) <= 0.05 * len(NAMES)


def test_at_least_90_percent_gather_nothing_inside_blocks() -> None:
    assert len(undivided().union(GATHERED)) <= 0.10 * len(NAMES)

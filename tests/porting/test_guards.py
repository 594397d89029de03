"""Whatever is changed, in the model, in its arguments or around it: `port` gives what the model gives, or refuses.

By default a few random changes of two models; `--guards N`: N in a row for each of twelve models, all kinds in turn.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from changes import CHANGES, World
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.capture.outputs import output_tensors
from xdit_ir.ir.difference import relative_error
from xdit_ir.porting import settings

NAMES = (
    *("plain-dit", "flux.1-dev", "sd3.5-large", "wan2.1-t2v-1.3b", "pixart-sigma", "qwen-image", "hunyuandit"),
    *("latte-1", "sana-1600m", "cogvideox-5b", "lumina-2", "plain-mmdit"),
)
SAMPLE = {"plain-dit": 10, "flux.1-dev": 4}


def world(name: str) -> World:
    model, example = models.load(f"{name}:tiny")
    model, example = copy.deepcopy(model).eval(), copy.deepcopy(example)
    block = next(one[0] for one in model.modules() if isinstance(one, nn.ModuleList))
    linear = next(one for one in block.modules() if isinstance(one, nn.Linear))
    return World(model, dict(example), linear, block)


def result(module: nn.Module, w: World) -> Any:
    """What a call gives: tensors, or the kind of error that the model's own code raises."""
    torch.manual_seed(0)
    try:
        with torch.no_grad(), w.around():
            return [x.clone() for x in output_tensors(module(**w.example))]
    except xir.XditError as error:
        return error
    except Exception as error:
        return type(error)


def test_there_are_many_kinds() -> None:
    assert len(CHANGES) >= 40 and len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_no_change_gives_a_wrong_answer(name: str, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--guards") or SAMPLE.get(name, 0)
    if not count:
        pytest.skip("with --guards N only")
    chance = random.Random(name if count <= max(SAMPLE.values()) else None)
    w = world(name)
    ported, kinds, done = xir.port(w.model), list(CHANGES), []
    with w.undo:
        for step in range(count):
            if step % len(kinds) == 0:
                chance.shuffle(kinds)
            kind = kinds[step % len(kinds)]
            done.append(kind)
            try:
                with torch.no_grad():
                    CHANGES[kind](w)
            except (RuntimeError, TypeError, AttributeError, ValueError, KeyError):
                continue  # not for this model as it is now
            wanted, got = result(w.model, w), result(ported, w)
            if isinstance(got, xir.XditError) or isinstance(wanted, type):
                if isinstance(wanted, type):  # a change under which the model itself fails ends here
                    return
                continue
            assert isinstance(got, list), (done, got)
            wide = 3e-2 if w.around is not torch.inference_mode and w.around().__class__ is torch.autocast else 1e-4
            assert relative_error(got, wanted) < wide, " > ".join(done)


# Guards made blind: the class or module, what tells of a change there, changes before the first call, and after.
BLIND = [
    (settings.ModelSettings, "unchanged", [], "another activation"),
    (settings._Dicts, "same", [], "forward of a layer"),
    (settings._Seen, "same", ["no bias"], "a bias"),
    (settings._Group, "same", [], "another class"),
    (settings._Group, "same", ["a hook with a closure"], "what the closure holds"),
    (settings, "same_entries", [], "a hook of all modules"),
]


@pytest.mark.parametrize(("owner", "name", "before", "kind"), BLIND)
def test_a_guard_that_is_blind_is_found_out(
    owner: Any, name: str, before: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each guard is needed, and the test above would see if it were not there."""
    monkeypatch.setattr(owner, name, lambda *_: True)
    w = world("plain-dit")
    with w.undo:
        for one in before:
            CHANGES[one](w)
        ported = xir.port(w.model)
        assert relative_error(result(ported, w), result(w.model, w)) < 1e-4
        CHANGES[kind](w)
        assert relative_error(result(ported, w), result(w.model, w)) > 1e-2

"""A plan in a file that was edited, or is of another version, is refused by the name of what is wrong in it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir.planning.plan import VERSION, Plan

MADE = xir.plan(nn.Linear(8, 8), {"input": torch.ones(2, 8)}, gpus=2, cfg=2)


def edited(place: str, value: Any) -> str:
    """The plan with another value at a place such as `candidates.0.ms`, or without it (`...`)."""
    found = data = json.loads(MADE.to_json())
    *path, last = (int(step) if step.isdigit() else step for step in place.split("."))
    for step in path:
        found = found[step]
    if value is ...:
        del found[last]
    else:
        found[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("version", 2, f"version = 2: this xdit_ir reads version {VERSION}; make the plan anew"),
        ("gpus", ..., "gpus is missing"),
        ("gpus", "two", "gpus = 'two': expected a whole number"),
        ("gpus", True, "gpus = True: expected a whole number"),
        ("gpus", 4, "candidates[0], c2: that takes 2 GPUs, but gpus = 4"),
        ("gpu", 2, "gpu is not known; did you mean 'gpus'? there are model,"),
        ("memory", "80GB", "memory = '80GB': expected a number"),
        ("memory", -1, "memory = -1: expected GiB, a positive number"),
        ("machine", None, "machine = None: expected a text"),
        ("candidates", [], "candidates is empty"),
        ("candidates", {}, "candidates = {}: expected a list, each names with values"),
        ("candidates.0", "c2", "candidates[0]: expected names with values, got 'c2'"),
        ("candidates.0.degrees.cfg", 4, "candidates[0], c4: that takes 4 GPUs, but gpus = 2"),
        ("candidates.0.degrees.cfg", "2", "candidates[0].degrees: cfg='2' is not a positive integer"),
        ("candidates.0.degrees.ulises", 2, "ulises=2 is no parallel degree; did you mean ulysses"),
        ("candidates.0.degrees.patches", 0, "candidates[0].degrees: patches=0 is not a positive integer"),
        ("candidates.0.why", ..., "candidates[0].why is missing"),
        ("candidates.1.why", "", "why is empty, which it is of the first only"),
        ("candidates.0.ms", "fast", "candidates[0].ms = 'fast': expected a number or null"),
        ("candidates.0.ms", -1, "candidates[0], c2: expected ms, gib and weights that are not negative"),
        ("candidates.0.parts.rest", math.inf, "candidates[0].parts.rest = inf: expected a number"),
        ("candidates.0.gib", [1.0], "candidates[0], c2: expected gib and weights of 2 ranks each"),
        ("candidates.0.stream_weights", "20", "candidates[0].stream_weights = '20': expected true or false or a whole"),
        ("candidates.0.stream_weights", -1, "stream_weights=-1: expected True or False"),
        ("speeds.bytes", -1, "speeds: Machine(bytes=-1): expected a positive number"),
        ("speeds.kernels.products", 0, "speeds.kernels: products = 0: expected a positive number"),
        ("speeds.links.each.0.hidden", 1, "speeds.links.each[0].hidden = 1: expected true or false"),
        ("kv_cache_dtype", "fp4", "kv_cache_dtype='fp4': expected one of"),
    ],
)
def test_what_was_edited_wrongly(place: str, value: Any, said: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=f"this is no plan as Plan.to_json writes it: .*{re.escape(said)}"):
        Plan.from_json(edited(place, value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_what_is_no_plan_at_all(text: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=r"this is no plan as Plan\.to_json writes it"):
        Plan.from_json(text)


def test_what_may_be_left_out_or_be_others() -> None:
    assert Plan.from_json(edited("machine", "mine")).machine == "mine"
    assert Plan.from_json(edited("kv_cache_dtype", ...)) == MADE


def test_unlimited_memory_is_no_number_of_json() -> None:
    plain = xir.plan(nn.Linear(8, 8), {"input": torch.ones(2, 8)}, gpus=1, machine=xir.Machine(bytes=1e9))

    def never(constant: str) -> Any:
        raise AssertionError(constant)

    assert plain.memory == math.inf and json.loads(plain.to_json(), parse_constant=never)["memory"] is None
    assert Plan.from_json(plain.to_json()) == plain

"""`parse(write(p))` is `p`: for a few models, for `--zoo-all` over the whole zoo, as traced, analysed and divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import TracedProgram
from xdit_ir.errors import ParallelizeError
from xdit_ir.ir.graphs import copy_graph
from xdit_ir.ir.printer import program_text
from xdit_ir.ir.program import LAYOUT, SPEC, WHERE, Program, TensorSpec, Where
from xdit_ir.simulation.examples import run_single
from xdit_ir.text import difference, load, parse, save, write

DEGREES: tuple[dict[str, int], ...] = ({"ulysses": 2, "ring": 2}, {"pipefusion": 2}, {"cfg": 2, "ulysses": 3})
NAME = "flux.1-dev"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--zoo-all")
        metafunc.parametrize("name", models.names() if everything else [NAME, "lumina-2"])


def is_same_again(program: Program) -> None:
    document = write(program)
    again = parse(document.text, document.attachments)
    assert difference(program, again) is None
    assert write(again).text == document.text
    assert program_text(again, bodies=True) == program_text(program, bodies=True)


def test_round_trip(name: str, request: pytest.FixtureRequest) -> None:
    """One model under USP and PipeFusion, one with ragged text and large constants under USP."""
    traced = xir.trace(*models.load(f"{name}:tiny"))
    is_same_again(traced.ir)
    is_same_again(traced.analysed)
    everything = request.config.getoption("--zoo-all")
    for degrees in DEGREES if everything else DEGREES[: 2 if name == NAME else 1]:
        try:
            divided = traced.parallelize(**degrees).ir
        except ParallelizeError:  # tests/parity knows which models refuse which degrees
            assert everything
        else:
            is_same_again(divided)


def test_an_opaque_module_is_attached() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    program = xir.trace(model, (torch.ones(2, 4),), leaf=["1"]).ir
    is_same_again(program)
    assert list(write(program).attachments) == ["leaf_Sequential.0"]


@pytest.fixture(scope="module")
def traced() -> TracedProgram:
    return xir.trace(*models.load("flux.1-dev:tiny"))


@pytest.fixture(scope="module")
def divided(traced: TracedProgram) -> Program:
    return traced.parallelize(ulysses=2).ir


def test_passes_do_to_a_parsed_program_what_they_do_to_the_traced_one(traced: TracedProgram) -> None:
    document = write(traced.ir)
    again = TracedProgram(parse(document.text, document.attachments))
    degrees = {"ulysses": 2, "ring": 2}
    assert difference(again.parallelize(**degrees).ir, traced.parallelize(**degrees).ir) is None


def test_a_parsed_program_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    example = (torch.randn(2, 4),)
    document = write(xir.trace(model, example).ir)
    got = run_single(parse(document.text, document.attachments), model, example)
    torch.testing.assert_close(got, model(*example), rtol=0, atol=0)


def test_files(tmp_path: Any, traced: TracedProgram) -> None:
    program = parse(write(traced.ir).text).replace(constants={"big": torch.arange(1000), "small": torch.arange(3)})
    files = save(program, tmp_path / "model.ir")
    assert [path.name for path in files] == ["model.ir", "model.ir.tensors"]
    assert difference(load(files[0]), program) is None


def edit(program: Program, change: Callable[[Any], None], pick: Callable[[Any], bool]) -> Program:
    graph = copy_graph(program.graph)
    change(next(node for node in graph.nodes if pick(node)))
    return program.replace(graph=graph)


def is_linear(node: Any) -> bool:
    return node.op == "call_function" and node.target is torch.ops.aten.linear.default


def set_meta(key: str, value: Any) -> Callable[[Any], None]:
    return lambda node: node.meta.__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        set_meta(SPEC, TensorSpec((1,), torch.float32)),
        set_meta(WHERE, Where("elsewhere")),
        set_meta(LAYOUT, None),
        lambda node: setattr(node, "args", node.args[:2]),
        lambda node: setattr(node, "args", (node.args[0], node.args[2], node.args[1])),
        lambda node: setattr(node, "target", torch.ops.aten.matmul.default),
        lambda node: setattr(node, "name", "another"),
    ],
)
def test_programs_that_differ_are_not_equal(divided: Program, change: Callable[[Any], None]) -> None:
    assert difference(divided, edit(divided, lambda node: None, is_linear)) is None
    assert difference(divided, edit(divided, change, is_linear)) is not None


def test_what_surrounds_the_graphs_is_compared_too(divided: Program) -> None:
    other = {
        "name": "X",
        "tokens": (),
        "constants": {"c": torch.ones(1)},
        "state": {},
        "mesh": None,
        "coordinates": (0, 1),
        "device": torch.device("meta"),
        "blocks": {},
    }
    for field, value in other.items():
        found = difference(divided, divided.replace(**{field: value}))
        assert found is not None and found.startswith(field)

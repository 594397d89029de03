"""The pipeline's own invariants: broken ones are found, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.api import ParallelProgram
from xdit_ir.checking.check import check_parallel
from xdit_ir.ir import buffer_ops as buffers
from xdit_ir.ir.buffer_ops import Read, Write
from xdit_ir.ir.graphs import copy_graph
from xdit_ir.ir.mesh import Mesh
from xdit_ir.pipefusion.pipeline_program import PatchStage, Pipeline, pipeline_text, verify_pipeline
from xdit_ir.pipefusion.stage_search import contiguous, folded

Case = tuple[torch.nn.Module, dict[str, Any]]


@pytest.fixture(scope="module")
def case() -> Case:
    return models.load("pixart-sigma:tiny")


@pytest.fixture(scope="module")
def parallel(case: Case) -> ParallelProgram:
    return xir.trace(*case).parallelize(pipefusion=2)


def changed(parallel: ParallelProgram, change: Callable[[fx.Graph], None], patch: int) -> ParallelProgram:
    """The same with the blocks of one patch changed on every stage."""
    assert parallel.pipeline is not None
    parts: dict[tuple[int, int], PatchStage] = {}
    for stage in range(parallel.pipeline.stages):
        part = parallel.pipeline.part(stage, patch)
        blocks = {}
        for name, block in part.program.blocks.items():
            blocks[name] = replace(block, graph=copy_graph(block.graph))
            change(blocks[name].graph)
        parts[stage, patch] = replace(part, program=part.program.replace(blocks=blocks))
    return replace(parallel, pipeline=replace(parallel.pipeline, _parts=parts))


def drop_writes(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if isinstance(node.target, Write):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def shift_writes(graph: fx.Graph) -> None:
    """As if the patch's rows began elsewhere."""
    for node in graph.nodes:
        if isinstance(node.target, Write):
            places = tuple(None if p is None else tuple((0, size) for _, size in p) for p in node.target.places)
            node.target = replace(node.target, places=places)


def test_a_value_that_is_never_published_is_found(case: Case, parallel: ParallelProgram) -> None:
    broken = changed(parallel, drop_writes, patch=1)
    with pytest.raises(xir.VerifyError, match=r"wait for each other.*read"):
        broken.simulate(*case)


def test_rows_in_the_wrong_place_are_found_where_they_are_read(case: Case, parallel: ParallelProgram) -> None:
    result = check_parallel(changed(parallel, shift_writes, patch=1), *case)
    assert not result.ok
    assert result.first_divergence is not None
    assert result.first_divergence.block == "transformer_blocks.0"


def test_messages_that_do_not_match_are_found(parallel: ParallelProgram) -> None:
    assert parallel.pipeline is not None
    verify_pipeline(parallel.pipeline)
    part = parallel.pipeline.part(1, 0)
    broken = replace(part, receives=part.receives[:-1])
    with pytest.raises(xir.VerifyError, match="stage 0 sends"):
        verify_pipeline(replace(parallel.pipeline, _parts={(1, 0): broken}))


def test_values_that_no_one_holds_are_found() -> None:
    traced = xir.trace(*models.load("flux.1-dev:tiny"))
    pipeline = traced.parallelize(pipefusion=2, stages=[1, 1, 1, 1]).pipeline
    assert pipeline is not None
    verify_pipeline(pipeline)
    part = pipeline.part(1, 0)
    assert not part.sends
    broken = replace(part, carried_out=part.carried_out[:-1])
    with pytest.raises(xir.VerifyError, match="its rank does not hold"):
        verify_pipeline(replace(pipeline, _parts={(1, 0): broken}))


def test_folded_stages_as_text(golden: Callable[[str, str], None]) -> None:
    traced = xir.trace(*models.load("flux.1-dev:tiny"))
    for name, stages in (("straight", [2, 2]), ("folded", [1, 1, 1, 1])):
        pipeline = traced.parallelize(pipefusion=2, stages=stages).pipeline
        assert pipeline is not None
        golden(f"pipeline.{name}", pipeline_text(pipeline))


def test_check_says_what_displaced_steps_do(case: Case, parallel: ParallelProgram) -> None:
    result = check_parallel(parallel, *case)
    assert result.ok
    assert len(result.notes) == 2
    assert "equal after" in result.notes[1]


def test_text_shows_stages_and_messages(parallel: ParallelProgram) -> None:
    text = str(parallel)
    assert "pipeline of 2 stages, 2 patches" in text
    assert "sends %" in text
    assert "256/pipefusion" in text


def test_every_rank_computes_its_stage_only(case: Case, parallel: ParallelProgram) -> None:
    pipeline: Pipeline | None = parallel.pipeline
    assert pipeline is not None
    report = parallel.report()
    assert sum(report.weight_bytes_per_rank) <= 1.01 * report.weight_bytes_total
    assert max(report.weight_bytes_per_rank) <= 0.7 * report.weight_bytes_total


@pytest.mark.parametrize("coordinates", [contiguous(3), folded(3), folded(1)])
@pytest.mark.parametrize("patches", [1, 3, 5])
def test_turns_follow_what_they_need_and_never_fall_together(
    parallel: ParallelProgram, coordinates: tuple[int, ...], patches: int
) -> None:
    assert parallel.pipeline is not None
    program = parallel.pipeline.program.replace(mesh=Mesh.of(pipefusion=patches))
    pipeline = Pipeline(program, coordinates, warmup_steps=1)
    last, ranks = pipeline.stages - 1, pipeline.mesh.world_size
    turns = {job: pipeline.issue_order(*job) for job in itertools.product(range(last + 1), range(3), range(patches))}
    for (stage, step, patch), turn in turns.items():
        assert stage == 0 or turns[stage - 1, step, patch] < turn
        assert patch == 0 or turns[stage, step, patch - 1] < turn
        assert stage or step == 0 or turns[last, step - 1, patch] < turn, "the scheduler has made its next latents"
    for rank in range(ranks):
        mine = sorted(turn for (stage, _, _), turn in turns.items() if stage in pipeline.stages_of(rank))
        assert len(set(mine)) == len(mine)
        steady = [turn for turn in mine if turns[last, 0, 0] <= turn < turns[0, 2, patches - 1]]
        assert patches < ranks or len(steady) == steady[-1] - steady[0] + 1, "busy all the time"


def test_a_rank_has_no_single_program(case: Case, parallel: ParallelProgram) -> None:
    with pytest.raises(xir.ParallelizeError, match="for each patch"):
        parallel.rank(0)


@given(st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(size)))
    cut = data.draw(st.integers(0, size))
    buffer, value = torch.zeros(2, size), torch.arange(2.0 * size).reshape(2, size)
    for patch, held in enumerate((order[:cut], order[cut:])):
        places = (None, tuple((index, 1) for index in held))
        buffers.write(buffer, value[:, list(held)], places)
        target = Read("x", patch, (0, 1), places)
        assert torch.equal(buffers.read(buffer, target), value[:, list(held)])
    assert torch.equal(buffer, value)

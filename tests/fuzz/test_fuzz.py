"""Random small models under random degrees: what the ranks compute is what the module computes, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dits
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import xdit_ir as xir
from xdit_ir.checking.check import check_parallel

FEW = 12
TOLERANCE = 1e-9
DEGREES: tuple[dict[str, int], ...] = (
    {"ulysses": 2},
    {"ulysses": 3},
    {"ring": 2},
    {"ring": 3},
    {"cfg": 2},
    {"ulysses": 2, "ring": 2},
    {"cfg": 2, "ulysses": 2},
    {"cfg": 2, "ring": 2},
    {"pipefusion": 2},
    {"pipefusion": 2, "patches": 3},
    {"pipefusion": 2, "ulysses": 2},
    {"pipefusion": 2, "cfg": 2},
)


def judge(recipe: dits.Recipe, degrees: dict[str, int]) -> str:
    """`equal` or `refused`; anything else is raised."""
    model, example = dits.build(recipe)
    traced = xir.trace(model, example)
    try:
        parallel = traced.parallelize(**degrees)
    except xir.ParallelizeError:
        return "refused"
    result = check_parallel(parallel, model, example, tolerance=TOLERANCE)
    assert result.ok, f"{recipe}\n{degrees}\n{result}"
    assert parallel.report().flops_total > 0
    return "equal"


def test_random_models(request: pytest.FixtureRequest) -> None:
    """The same examples at every run; `--fuzz N` tries N others."""
    count: int = request.config.getoption("--fuzz")
    seen: dict[str, int] = {}

    @settings(
        max_examples=count or FEW,
        derandomize=not count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if not count else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(recipe=dits.recipes(), degrees=st.sampled_from(DEGREES))
    def run(recipe: dits.Recipe, degrees: dict[str, int]) -> None:
        note(str(degrees))
        verdict = judge(recipe, degrees)
        seen[verdict] = seen.get(verdict, 0) + 1

    run()
    assert seen["equal"] >= seen.get("refused", 0), seen


def test_the_models_are_deterministic_and_depend_on_every_input() -> None:
    """Or there would be nothing to compare."""
    recipe = dits.Recipe(
        batch=2, grid=(2, 4, 3), patch=2, text=5, mask="bool", heads=2, groups=1, head_dim=8,
        kinds=("joint", "cross", "window", "conv"),
        between=("registers", "pool"), style="biased", norm="layer", rotary="input", modulation="block", mlp="conv",
        qk_norm=True, skips=True, spare=True, refiner=True, output="dict", seed=0,
    )  # fmt: skip
    model, example = dits.build(recipe)
    run: Callable[..., Any] = model
    with torch.no_grad():
        [want] = pytree.tree_leaves(run(**example))
        assert torch.equal(want, pytree.tree_leaves(run(**example))[0])
        for name, value in example.items():
            other = ~value if value.dtype == torch.bool else 2 * value
            assert not torch.allclose(want, pytree.tree_leaves(run(**{**example, name: other}))[0]), name


@pytest.mark.timeout(100)
def test_a_block_that_wants_one_order_for_the_other_is_settled() -> None:
    """Propagation went on for ever, and took all memory."""
    recipe = dits.Recipe(
        batch=3, grid=(3, 2, 3), patch=2, text=0, mask="pooled", heads=6, groups=3, head_dim=8,
        kinds=("causal", "causal"),
        between=(), style="einsum", norm="layer", rotary="halves", modulation="token", mlp="gelu",
        qk_norm=True, skips=False, spare=True, refiner=True, output="tuple", seed=2,
    )  # fmt: skip
    assert judge(recipe, {"cfg": 2, "ulysses": 2}) == "equal"


def test_a_patch_gets_from_other_ranks_what_later_patches_read() -> None:
    """Refused by the verifier: the first patch held all rows, and no rank those of the second one."""
    recipe = dits.Recipe(
        batch=2, grid=(1, 2, 6), patch=2, text=5, mask="none", heads=1, groups=1, head_dim=4,
        kinds=("cross", "window", "window", "conv"),
        between=("upsample", "upsample"), style="sdpa", norm="group", rotary="none", modulation="token", mlp="conv",
        qk_norm=False, skips=False, spare=False, refiner=False, output="tuple", seed=3,
    )  # fmt: skip
    assert judge(recipe, {"pipefusion": 2, "ulysses": 2}) == "equal"


def test_ranks_meet_in_one_order_where_one_has_no_rows_of_a_patch() -> None:
    """In a synchronous step it went on to a later exchange than the one in which another rank waited for it."""
    recipe = dits.Recipe(
        batch=2, grid=(3, 2, 2), patch=1, text=4, mask="additive", heads=4, groups=2, head_dim=8,
        kinds=("self",),
        between=("registers",), style="fused", norm="rms", rotary="none", modulation="none", mlp="gelu",
        qk_norm=False, skips=False, spare=False, refiner=False, output="tuple", seed=1,
    )  # fmt: skip
    assert judge(recipe, {"pipefusion": 2, "ulysses": 2}) == "equal"

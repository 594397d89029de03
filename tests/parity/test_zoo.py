"""Every model of the zoo under Ulysses and CFG: equal, or refused for a reason that is written down here."""

from __future__ import annotations

import pytest

import xdit_ir as xir
from xdit_ir import models

# What cannot be captured yet: the error names the operator, the input or the value that the model reads.
NOT_CAPTURED = {
    "wan-animate-2-reference": "kv_cache",
}
# What is captured but cannot be divided like this.
NOT_DIVIDED = {
    ("t5-film-decoder", "ulysses"): "token stream",
    ("sana-wm-refiner", "ulysses"): "token stream",
    ("cosmos3-omni", "cfg"): "batch",
}


@pytest.mark.parametrize("name", [name for name in models.names() if name not in NOT_CAPTURED])
def test_equal_on_every_rank(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    traced = xir.trace(model, example)
    for degree in ("ulysses", "cfg"):
        if (name, degree) in NOT_DIVIDED:
            with pytest.raises(xir.ParallelizeError, match=NOT_DIVIDED[name, degree]):
                traced.parallelize(**{degree: 2})
        else:
            result = xir.check(model, example, traced=traced, **{degree: 2})
            assert result.ok, str(result)


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(xir.TraceError, match=NOT_CAPTURED[name]):
        xir.trace(*models.load(f"{name}:tiny"))

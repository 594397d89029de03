"""Whatever a machine's prices make passes choose, every rank gives the model's output."""

from __future__ import annotations

import pytest
from loaded import load

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.planning import hardware

MACHINES = ("h200", "rtx4090", "l20")
DEGREES = (
    *({"ulysses": 2}, {"ulysses": 3}, {"ulysses": 4}, {"ring": 2}, {"cfg": 2}, {"tensor": 2}),
    *({"ulysses": 2, "ring": 2}, {"tensor": 2, "ulysses": 2}),
)
FEW = (("anyflow-14b", "h200"), ("sana-1600m", "l20"))  # divided otherwise than at the prices of an H100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A model for two machines, two ranks each; the zoo on all, under all degrees, with `--zoo-all`."""
    everything = metafunc.config.getoption("--zoo-all")
    pairs = [(name, machine) for name in sorted(models.names()) for machine in MACHINES] if everything else FEW
    metafunc.parametrize(("name", "machine"), pairs, ids=map("-".join, pairs))
    metafunc.parametrize("degrees", DEGREES if everything else DEGREES[:1], ids=str)


def test_prices_change_times_and_not_results(name: str, machine: str, degrees: dict[str, int]) -> None:
    case = load(name)
    try:
        parallel = case.traced.parallelize(**degrees, machine=hardware.load(machine).prices)
    except xir.ParallelizeError as error:
        assert "cfg" in degrees and "divides the batch" in str(error)
        pytest.skip(str(error))
    case.assert_equal(parallel)

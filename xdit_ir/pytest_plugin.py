"""The pytest plugin: `@pytest.mark.xdit(...)` runs a test once for each set of degrees, with the fixture `xdit`.

    @pytest.mark.xdit(degrees=["u2", "c2r2"])          # or world_size=4: all ways to spend four ranks
    def test_my_model(xdit):
        xdit(model, example)

A set that follows from a `world_size` and is illegal for the model skips its test; one that was asked for fails it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from xdit_ir.capture.inputs import Example

NAME = "xdit"
MARKER = (
    "xdit(degrees=None, world_size=None, tolerance=1e-5, processes=False, max_share=None, max_fallbacks=None): run "
    "once per set of degrees, with the fixture `xdit`, called as xdit(model, example)"
)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


@dataclass(frozen=True)
class CheckSettings:
    """The marker's arguments."""

    degrees: Any = None
    world_size: int | None = None
    tolerance: float = 1e-5
    processes: bool = False
    max_share: float | None = None
    max_fallbacks: int | None = None

    def sets(self) -> dict[str, dict[str, Any]]:
        """The sets of degrees, by name."""
        from xdit_ir.testing import degree_sets, degrees_of  # torch: only where a test is marked

        if (self.degrees is None) == (self.world_size is None):
            raise pytest.UsageError("the marker xdit takes either degrees or world_size")
        return degree_sets(degrees_of(self.world_size) if self.world_size is not None else self.degrees)


@dataclass(frozen=True)
class Check:
    """`xdit(model, example)`: assert that the model divided as the test says computes what it computes alone."""

    degrees: dict[str, Any]
    settings: CheckSettings

    def __call__(self, model: nn.Module, example: Example) -> None:
        """Fails the test where a rank differs; skips it if the degrees were not asked for and are illegal here."""
        from xdit_ir.errors import ParallelizeError
        from xdit_ir.testing import assert_parallel

        options = asdict(self.settings)
        del options["degrees"], options["world_size"]
        try:
            assert_parallel(model, example, self.degrees, **options)
        except ParallelizeError as error:
            if self.settings.world_size is None:
                raise
            pytest.skip(str(error))


def _settings(marker: pytest.Mark) -> CheckSettings:
    try:
        return CheckSettings(*marker.args, **marker.kwargs)
    except TypeError as error:
        raise pytest.UsageError(f"the marker is {MARKER.partition(':')[0]}; {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each set of degrees."""
    marker = metafunc.definition.get_closest_marker(NAME)
    if marker is None or NAME not in metafunc.fixturenames:
        return
    settings = _settings(marker)
    checks = {name: Check(one, settings) for name, one in settings.sets().items()}
    metafunc.parametrize(NAME, checks.values(), ids=checks.keys(), indirect=True)


@pytest.fixture(name=NAME)
def _xdit(request: pytest.FixtureRequest) -> Callable[[nn.Module, Example], None]:
    """`xdit(model, example)`, for a test that is marked with `xdit`."""
    check: Check | None = getattr(request, "param", None)
    if check is None:
        raise pytest.UsageError("the fixture xdit needs the marker: @pytest.mark.xdit(degrees=[...])")
    return check

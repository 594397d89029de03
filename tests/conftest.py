"""Golden files: `golden(name, text)` compares with tests/golden/NAME.txt, or NAME where that ends with `.ir`;
`pytest --update-golden` rewrites them."""

from __future__ import annotations

import gc
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")
    parser.addoption("--zoo-all", action="store_true", help="run every model of the zoo under every set of degrees")
    parser.addoption(
        "--large", action="store_true", help="also tests that need gigabytes, or more processes than cores"
    )
    parser.addoption("--pipefusion-all", action="store_true", help="run every PipeFusion case on real processes")
    parser.addoption("--pipelines-all", action="store_true", help="run every pipeline under every set of degrees")
    parser.addoption("--guards", type=int, default=0, metavar="N", help="change each of twelve ported models N times")
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="try N random models, other ones at every run")
    parser.addoption("--fuzz-texts", type=int, default=0, metavar="N", help="try N mutations of texts of programs")


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    def compare(name: str, text: str) -> None:
        path = GOLDEN / (name if name.endswith(".ir") else f"{name}.txt")
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n")
        assert text + "\n" == path.read_text(), f"differs from {path.name}; if meant, run pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def pipeline_builders() -> dict[str, Any]:
    """What `pipeline_folder.py` defines."""
    return runpy.run_path(str(Path(__file__).with_name("pipeline_folder.py")))


@pytest.fixture(scope="session")
def pipeline_folder(pipeline_builders: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, as `save_pretrained` writes it."""
    folder: Path = pipeline_builders["save"](tmp_path_factory.mktemp("saved") / "pipeline")
    return folder


@pytest.fixture(scope="session")
def of_one_patch() -> dict[str, str]:
    """The zoo's models whose latents cannot be divided into patches, and why not: stages take them whole."""
    return {
        "kandinsky-2.2-prior": "output is not divided",
        "nucleus-image": "stale rows",
    }

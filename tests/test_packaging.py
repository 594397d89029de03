"""`setup.cfg` names every package of the tree."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = {
    "xdit_ir": "xdit_ir",
    "passes": "xdit_ir.passes",
    "models": "xdit_ir.models",
    "tools": "xdit_ir.tools",
}


def test_every_package_is_listed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = set()
    for folder, name in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(config["options"]["packages"].split()) == found


def test_pyproject_is_the_build_backend_only() -> None:
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3

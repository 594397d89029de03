"""Our own DiTs: plain code that knows nothing of the compiler, alive in every input, each sample by itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from xdit_ir import models
from xdit_ir.models import plain

FILES = sorted(path for path in Path(plain.__file__).parent.glob("*.py") if path.name != "__init__.py")
NAMES = [name for name in models.names() if models.entry(name).cls.startswith(plain.__name__)]
ALLOWED = {"__future__", "einops", "itertools", "math", "torch"}
PARAMETERS = {  # millions: of the papers' models where those have the same parts
    "plain-dit": 675,
    "plain-linear-dit": 1604,
    "plain-mmdit": 2028,
    "plain-packed-dit": 2150,
    "plain-stdit": 1206,
    "plain-uvit": 501,
}


def samples(output: Any) -> list[torch.Tensor]:
    """One tensor a sample."""
    return list(output)


def changed(value: Any) -> Any:
    """The last sample different."""
    if isinstance(value, list):
        return [*value[:-1], torch.randn_like(value[-1])]
    other = value.clone()
    other[-1] = other[-1].roll(1) if value.ndim > 1 else other[-1] // 2 + 1
    return other


def test_every_file_has_an_entry() -> None:
    assert len(FILES) >= 6
    assert {models.entry(name).cls.rpartition(":")[0].rpartition(".")[2] for name in NAMES} == {p.stem for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_plain_short_and_from_a_paper(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {(name or "").partition(".")[0] for name in imported} <= ALLOWED
    assert len(source.splitlines()) < 150
    assert re.search(r"arXiv \d{4}\.\d{5}", ast.get_docstring(tree) or "")


@pytest.mark.parametrize("name", NAMES)
def test_size(name: str) -> None:
    model, example = models.load(name, device="meta")
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == PARAMETERS[name]
    assert all(leaf.is_meta or leaf.numel() < 1000 for leaf in tree_leaves(example))


@pytest.mark.parametrize("name", NAMES)
def test_depends_on_every_input_of_the_same_sample_only(name: str) -> None:
    model, example = models.load(f"{name}:tiny")
    with torch.no_grad():
        before = samples(model(**example))
        for key, value in example.items():
            after = samples(model(**{**example, key: changed(value)}))
            assert torch.allclose(after[0], before[0], atol=1e-5), key
            assert (after[1] - before[1]).abs().max() > 1e-2, key

"""Rules about the source itself: imports point inward, and no model decides anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import xdit_ir
from xdit_ir import models, passes

# The data flow, inner to outer: a module may import from modules before its own group, and from its own group.
LAYERS = (
    ("xdit_ir.errors", "xdit_ir.partition"),
    ("xdit_ir.mesh",),
    ("xdit_ir.layout", "xdit_ir.program", "xdit_ir.difference"),
    ("xdit_ir.leaf",),
    ("xdit_ir.ops", "xdit_ir.interpret", "xdit_ir.capture"),
    ("xdit_ir.rules",),
    ("xdit_ir.draft", "xdit_ir.propagate", "xdit_ir.cost", "xdit_ir.printer"),
    ("xdit_ir.verify", "xdit_ir.profile", "xdit_ir.cuts", "xdit_ir.displacement", "xdit_ir.textual"),
    ("xdit_ir.runtime.flash_ops",),
    ("xdit_ir.runtime.backends",),
    ("xdit_ir.runtime.exchange", "xdit_ir.runtime.attention", "xdit_ir.runtime.buffers"),
    ("xdit_ir.overtime",),
    ("xdit_ir.passes",),
    ("xdit_ir.specialize",),
    ("xdit_ir.stages", "xdit_ir.patches", "xdit_ir.together", "xdit_ir.work"),
    ("xdit_ir.simulate", "xdit_ir.simulate_steps", "xdit_ir.report", "xdit_ir.pipeline", "xdit_ir.runtime"),
    ("xdit_ir.pass_list",),
    ("xdit_ir.pipeline_report",),
    ("xdit_ir.api",),
    ("xdit_ir.inspection",),
    ("xdit_ir.check", "xdit_ir.divergence", "xdit_ir.modules", "xdit_ir.runtime.port", "xdit_ir.runtime.ported"),
    ("xdit_ir.generation",),
    ("xdit_ir",),
    ("xdit_ir.models",),
    ("xdit_ir.tools", "xdit_ir.testing", "xdit_ir.pytest_plugin"),
)
FOLDERS = {"xdit_ir": Path(xdit_ir.__file__).parent, "xdit_ir.passes": Path(passes.__file__).parent}
# Parts of class names that are words of the field, not names of models.
WORDS = {
    "transformer",
    "dual",
    "prior",
    "temporal",
    "dit",
    "sparse",
    "video",
    "audio",
    "image",
    "edit",
    "text",
    "stable",
    "plain",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def layer(module: str) -> int:
    """The place of the longest listed prefix."""
    matches = [
        (len(name), place)
        for place, names in enumerate(LAYERS)
        for name in names
        if module == name or (module.startswith(name + ".") and name != "xdit_ir")
    ]
    assert matches, f"{module} has no place in LAYERS"
    return max(matches)[1]


def imports(path: Path) -> Iterator[str]:
    """What a module imports at run time."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("xdit_ir"):
            known = {name for name, _ in modules()}
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("xdit_ir"))


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value).rpartition("/")[2])
def test_imports_point_inward(module: str, path: Path) -> None:
    outward = [name for name in imports(path) if layer(name) > layer(module)]
    assert outward == []


def model_names() -> set[str]:
    """Stems of the class names of all diffusers transformers, and of the zoo's names."""
    import diffusers.models.transformers as transformers

    classes = [name for name in dir(transformers) if "Transformer" in name or "Model" in name]
    stems = {re.split(r"Transformer|DiT|Model|[0-9]", name)[0].lower() for name in classes}
    zoo = {re.split(r"[^a-z]", name.lower())[0] for name in models.names()}
    return {stem for stem in stems | zoo if len(stem) > 2} - WORDS


def words_of(text: str) -> set[str]:
    """Identifiers split at underscores and capitals."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


def test_no_model_name_decides_anything() -> None:
    names = model_names()
    assert {"flux", "wan", "latte"} <= names
    found = {(module, word) for module, path in modules() for word in words_of(path.read_text()) & names}
    assert found == set()

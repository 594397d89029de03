"""Rules about the source itself: imports point inward, and no model decides anything."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import networkx as nx

import xdit_ir
from xdit_ir import models, passes, tools

# The data flow: a folder (or module of the root) imports only from those that stand before it.
ORDER = (
    *("errors", "ir", "kernels", "reflection", "capture", "rules", "transport", "sharding", "text"),
    *("pipefusion", "caching", "passes", "simulation", "parallel", "emission", "deferral", "pipelined", "runtime"),
    *(
        "api",
        "degrees",
        "planning",
        "porting",
        "checking",
        "inspection",
        "generation",
        "serving",
        "",
        "models",
        "testing",
    ),
    *("pytest_plugin", "tools"),
)
FOLDERS = {
    "xdit_ir": Path(xdit_ir.__file__).parent,
    **{f"xdit_ir.{one.__name__.rpartition('.')[2]}": Path(str(one.__file__)).parent for one in (passes, models, tools)},
}
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


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands in the root; empty for the root."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path, known: Collection[str]) -> Iterator[str]:
    """The modules that a module imports, wherever it does, for typing only too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "xdit_ir":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "xdit_ir")


def import_graph() -> nx.DiGraph[str]:
    """Modules, and what they import."""
    paths = dict(modules())
    return nx.DiGraph((name, one) for name, path in paths.items() for one in imports(path, paths) if one != name)


def test_folders_stand_in_the_order_of_the_data_flow() -> None:
    places = {name: place for place, name in enumerate(ORDER)}
    edges = ((module, one) for module, one in import_graph().edges if room(module) != room(one))
    assert [f"{module} -> {one}" for module, one in edges if places[room(one)] > places[room(module)]] == []


def test_the_page_for_newcomers_has_this_order() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert listed == [name for name in ORDER if name]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert [sorted(circle) for circle in nx.strongly_connected_components(import_graph()) if len(circle) > 1] == []


def test_a_name_of_a_class_has_one_meaning() -> None:
    """Classes that other modules may use; those with an underscore are a module's own."""
    own = ((name, path) for name, path in modules() if room(name) != "models")
    trees = [(name, ast.parse(path.read_text())) for name, path in own]
    found = [(node.name, name) for name, tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    names = Counter(name for name, _ in found if not name.startswith("_"))
    assert {(name, where) for name, where in found if names[name] > 1} == set()


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
    ours = ((module, path) for module, path in modules() if room(module) not in ("models", "tools"))
    found = {(module, word) for module, path in ours for word in words_of(path.read_text()) & names}
    assert found == set()

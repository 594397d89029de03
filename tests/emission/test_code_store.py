"""Code that was kept on disk is found by what it was made of and where, or not at all."""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from xdit_ir.emission import kept_files
from xdit_ir.emission.code_store import CodeStore, KeptCode
from xdit_ir.emission.structure import Structure
from xdit_ir.emission.template import Template
from xdit_ir.ir.program import SPEC, TensorSpec

aten = torch.ops.aten
OPTIONS = {"deterministic": True}


def structure(tokens: int, function: object = aten.gelu.default) -> Structure:
    """That of a body of one operator on so many tokens."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[SPEC] = TensorSpec((tokens, 8), torch.float32)
    graph.output((graph.call_function(function, (x,)),))
    found = Structure.of(fx.GraphModule(nn.Module(), graph))
    assert found is not None
    return found


@pytest.fixture
def store(tmp_path: Path) -> CodeStore:
    return CodeStore(tmp_path, torch.device("cpu"))


def keep(store: CodeStore, of: Structure, template: Template) -> KeptCode:
    """Note that code was kept."""
    place = store.place(of, OPTIONS, template)
    assert place is not None
    place.path.parent.mkdir(parents=True, exist_ok=True)
    place.path.with_suffix(".json").write_text(json.dumps(vars(template)))
    return place


ANY_TOKENS, FIVE_TOKENS = Template((None, 8), (0, -1)), Template((5, 8), (-1, -1))


def test_the_most_general_code_that_fits_is_found(store: CodeStore) -> None:
    assert store.find(structure(5), OPTIONS) is None
    alone = keep(store, structure(5), FIVE_TOKENS)
    assert store.find(structure(5), OPTIONS) == (FIVE_TOKENS, alone)
    assert store.find(structure(6), OPTIONS) is None, "made for another number"
    shared = keep(store, structure(5), ANY_TOKENS)
    for tokens in (5, 6):
        assert store.find(structure(tokens), OPTIONS) == (ANY_TOKENS, shared)


def test_other_operators_options_and_settings_find_other_code(store: CodeStore) -> None:
    keep(store, structure(5), FIVE_TOKENS)
    assert store.find(structure(5, aten.silu.default), OPTIONS) is None
    assert store.find(structure(5), {"deterministic": False}) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert store.find(structure(5), OPTIONS) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert store.find(structure(5), OPTIONS) is not None


def test_what_has_no_name_in_another_process_is_not_kept(store: CodeStore, caplog: pytest.LogCaptureFixture) -> None:
    def local(x: torch.Tensor) -> torch.Tensor:
        return x

    with caplog.at_level(logging.DEBUG, "xdit_ir"):
        assert store.place(structure(5, local), OPTIONS, FIVE_TOKENS) is None
    assert "cannot be kept on disk, so every process compiles it" in caplog.text
    assert store.find(structure(5, local), OPTIONS) is None


def test_damaged_files_are_none(store: CodeStore, caplog: pytest.LogCaptureFixture) -> None:
    kept = keep(store, structure(5), FIVE_TOKENS)
    kept._code().write_bytes(b"no code")
    with caplog.at_level(logging.DEBUG, "xdit_ir"):
        assert kept.load() is None
    assert "is compiled anew" in caplog.text
    kept.path.with_suffix(".json").write_text("{")
    assert store.find(structure(5), OPTIONS) is None


def test_compilers_without_caches_keep_nothing() -> None:
    device = torch.device("cpu")
    assert CodeStore.of(device) is not None
    with torch._inductor.config.patch(force_disable_caches=True):
        assert CodeStore.of(device) is None


def test_what_was_used_the_longest_ago_goes_first(tmp_path: Path) -> None:
    for age, name in ((3, "a/old"), (2, "b/used"), (1, "b/new")):
        kept_files.write(tmp_path / name, bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    kept_files.used(tmp_path / "b/used", tmp_path / "b/gone")
    kept_files.trim(tmp_path, 300)
    assert len(list(tmp_path.rglob("*"))) == 5, "there is room for all"
    kept_files.trim(tmp_path, 250)
    assert not (tmp_path / "a").exists(), "folders with nothing left go too"
    kept_files.trim(tmp_path, 100)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["used"]


def test_two_processes_may_trim_one_folder(tmp_path: Path) -> None:
    for number in range(300):
        kept_files.write(tmp_path / str(number % 7) / str(number), bytes(10))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(kept_files.trim, tmp_path, 1000) for _ in range(4)]:
            done.result()
    left = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert left <= 1000

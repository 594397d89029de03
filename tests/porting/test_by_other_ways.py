"""What code reads where its text does not say so plainly: noticed all the same when it changes."""

from __future__ import annotations

import functools
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xdit_ir as xir

X = torch.arange(6.0).reshape(2, 3)
VARIABLE = "XDIT_TEST_BY_A_GLOBAL"
BY = 1.0


class Reads(nn.Module):
    """Multiplies by what `read` gives."""

    by_1 = 1.0

    def __init__(self, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.read = read
        self.hidden, self.local = Hides(), threading.local()
        self.partial = functools.partial(lambda by: by, by=1.0)
        self.local.by = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read(self)


class Hides:
    """Has an attribute, and says that it has none."""

    def __init__(self) -> None:
        object.__setattr__(self, "_by", 1.0)

    def __getattribute__(self, name: str) -> Any:
        if name == "by":
            return object.__getattribute__(self, "_by")
        raise AttributeError(name)


def imports(model: Any) -> float:
    import beside_the_model  # type: ignore[import-not-found]

    return float(beside_the_model.BY)


def imports_a_name(model: Any) -> float:
    from beside_the_model import BY as by

    return float(by)


def calls_what_is_beside(model: Any) -> float:
    return float(model.function())


def put(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: setattr(sys.modules[name], "BY", value)


KINDS: dict[str, tuple[Callable[[Any], float], Callable[[Any], Any]]] = {
    "a variable by a global": (
        lambda model: float(os.environ.get(VARIABLE, "1")),
        lambda model: os.environ.__setitem__(VARIABLE, "2"),
    ),
    "keywords of a partial": (lambda model: model.partial(), lambda model: model.partial.keywords.update(by=2.0)),
    "a text that is evaluated": (lambda model: eval("BY * 1.0"), put(__name__, 2.0)),  # type: ignore[no-any-return]
    "an attribute of a class by a text": (
        lambda model: getattr(type(model), f"by_{1}"),  # type: ignore[no-any-return]
        lambda model: setattr(Reads, "by_1", 2.0),
    ),
    "an object that hides what it holds": (
        lambda model: model.hidden.by,  # type: ignore[no-any-return]
        lambda model: object.__setattr__(model.hidden, "_by", 2.0),
    ),
    "a module that is imported inside": (imports, put("beside_the_model", 2.0)),
    "a name that is imported inside": (imports_a_name, put("beside_the_model", 2.0)),
    "a global of a function beside the model": (calls_what_is_beside, put("beside_the_model", 2.0)),
}


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A file beside that of the model, which belongs to no package."""
    (tmp_path / "beside_the_model.py").write_text("BY = 1.0\n\n\ndef function():\n    return BY\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "beside_the_model", raising=False)
    return __import__("beside_the_model")


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_noticed(kind: str, beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BY", 1.0)
    monkeypatch.setattr(Reads, "by_1", 1.0)
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.delenv(VARIABLE)
    read, change = KINDS[kind]
    model = Reads(read)
    model.__dict__["function"] = beside.function
    ported = xir.port(model)
    for by in (1, 1, 2, 2):
        if by == 2:
            change(model)
        assert torch.equal(ported(X), X * by) and torch.equal(model(X), X * by)
    assert len(ported.programs) == 2


def test_each_thread_has_its_own() -> None:
    model = Reads(lambda model: getattr(model.local, "by", 3.0))
    ported, found = xir.port(model), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(ported(X)))
        thread.start()
        thread.join()
        found.append(ported(X))
    assert all(torch.equal(one, X * by) for one, by in zip(found, (3, 1, 3, 1), strict=True))

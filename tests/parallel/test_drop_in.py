"""What a port is to code that knows only the original; one process, one rank."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_pipeline import build_pipeline
from torch import nn

import xdit_ir as xir
from xdit_ir import models

NAME = "wan2.1-t2v-14b:tiny"


@pytest.fixture
def loaded() -> tuple[nn.Module, dict[str, Any]]:
    return models.load(NAME)


def test_state_and_attributes_are_the_originals(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    for module in (xir.port(model), xir.trace(model, example).parallelize().emit(model)):
        assert list(module.state_dict()) == list(model.state_dict())
        assert [name for name, _ in module.named_modules()] == [name for name, _ in model.named_modules()]
        assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
        assert inspect.signature(module.forward) == inspect.signature(model.forward)
        assert isinstance(module, nn.Module) and isinstance(module, type(model))
        for name in ("config", "dtype", "device", "training"):
            assert getattr(module, name) == getattr(model, name)
        with pytest.raises(AttributeError):
            module.no_such_attribute  # noqa: B018


def test_what_is_set_on_a_port_reaches_the_original(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, _ = loaded
    ported = xir.port(model)
    ported.gradient_checkpointing = True
    assert model.gradient_checkpointing is True
    assert ported.train() is ported and model.training and all(child.training for child in model.children())
    assert ported.eval() is ported and not model.training
    assert ported.to(torch.float64) is ported and ported.dtype == model.dtype == torch.float64
    ported.note = 1
    assert ported.note == 1 and not hasattr(model, "note")
    del ported.note
    assert not hasattr(ported, "note")
    with ported.cache_context("cond"):
        pass


def test_hooks_and_output_type(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    ported, seen = xir.port(model), []
    ported.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        want = model(**{**example, "return_dict": True})
        got = ported(**{**example, "return_dict": True})
    assert type(got) is type(want) and seen == [got]
    torch.testing.assert_close(got.sample, want.sample, rtol=1e-4, atol=1e-5)
    assert ported.program is not None and ported.programs == (ported.program,)


def test_no_gradient_is_silently_lost(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    sample = xir.port(model)(**{**example, "return_dict": True}).sample
    with pytest.raises(xir.GradientError, match="no_grad"):
        sample.sum().backward()


def test_a_copy_is_independent(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    ported = xir.port(model)
    with torch.no_grad():
        ported(**example)
        other = copy.deepcopy(ported)
        other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
        assert other(**example)[0].abs().max() == 0 != ported(**example)[0].abs().max()


def test_forward_may_be_wrapped(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    ported, original, calls = xir.port(model), model.forward, []
    inner = ported.forward
    ported.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    with torch.no_grad():
        ported(**example)
    assert calls == [1] and model.forward == original


def test_a_pipeline_takes_and_saves_it(tmp_path: Path) -> None:
    pipe = build_pipeline()
    before = dict(pipe.config)
    pipe.transformer = xir.port(pipe.transformer, ulysses=2)
    assert dict(pipe.config) == before
    assert pipe.to("cpu") is pipe and pipe.device.type == "cpu" and pipe.transformer in pipe.components.values()
    pipe.save_pretrained(tmp_path)
    saved = type(pipe.transformer._xdit_original).from_pretrained(tmp_path / "transformer")
    assert list(saved.state_dict()) == list(pipe.transformer.state_dict())


@pytest.mark.parametrize("wrong", [{"ulises": 2}, {"ulysses": 0}, {"ring": 1.5}, {"cfg": True}])
def test_unknown_and_impossible_degrees(wrong: dict[str, Any]) -> None:
    with pytest.raises(xir.ParallelizeError, match=next(iter(wrong))) as caught:
        xir.port(nn.Linear(2, 2), **wrong)
    if "ulises" in wrong:
        assert all(name in str(caught.value) for name in ("cfg", "ring", "ulysses", "pipefusion"))


@pytest.mark.parametrize("wrong", [{"compile": 1}, {"cuda_graph": "yes"}, {"release": "yes"}, {"weights": 3}])
def test_options_of_another_type(wrong: dict[str, Any]) -> None:
    [(name, given)] = wrong.items()
    with pytest.raises(xir.ParallelizeError, match=f"{name}={given!r}: expected"):
        xir.port(nn.Linear(2, 2), **wrong)


def test_without_torchrun(loaded: tuple[nn.Module, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = loaded
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(xir.ParallelizeError, match="torchrun --nproc-per-node 2"):
        xir.port(model, ulysses=2)(**example)
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(xir.ParallelizeError, match="needs 2 processes, this job has 3; nearest legal: ulysses=3"):
        xir.port(model, ulysses=2)  # torchrun has said how many there are


def test_weights_must_be_loaded() -> None:
    model, example = models.load(NAME, device="meta")
    program = xir.trace(model, example).parallelize()
    with pytest.raises(xir.MismatchError, match="load weights first"):
        program.emit(model)
    with pytest.raises(xir.MismatchError, match="load weights first"):
        xir.port(model)(**example)
    loaded, real = models.load(NAME)
    with torch.no_grad():
        got = program.emit(loaded)(**real)
        torch.testing.assert_close(got[0], loaded(**real)[0], rtol=1e-4, atol=1e-5)


def test_an_emitted_module_names_what_no_longer_fits(loaded: tuple[nn.Module, dict[str, Any]]) -> None:
    model, example = loaded
    emitted = xir.trace(model, example).parallelize().emit(model)
    with pytest.raises(xir.MismatchError, match="hidden_states: expected"):
        emitted(**{**example, "hidden_states": example["hidden_states"][:1]})
    model.to(torch.float64)
    with pytest.raises(xir.MismatchError, match=r"the program needs torch\.float32"):
        emitted(**example)


def test_too_many_specialisations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from xdit_ir.porting import specialisations as module

    monkeypatch.setattr(module, "LIMIT", 2)

    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x * by

    ported = xir.port(Scale())
    x = torch.ones(3)
    for by in (1.0, 2.0):
        assert ported(x, by).tolist() == [by] * 3
    with pytest.warns(UserWarning, match="changes in by"):
        ported(x, 3.0)
    assert len(ported.programs) == 2


@pytest.mark.parametrize(("degrees", "batch"), [({"ulysses": 2}, 2), ({"cfg": 2}, 1)])
def test_prompts_of_a_length_share_a_program(workers: Any, degrees: dict[str, int], batch: int) -> None:
    """Calls of a pair, which run at once, may have programs of their own."""
    for result in workers(2).run("prompts", degrees=degrees, batch=batch, lengths=[20, 200, 10, 100, 250]):
        assert [programs for programs, _ in result] == [1, 2, 2, 3, 3]
        assert max(error for _, error in result) < 1e-5, result

"""Decoders and encoders of a pipeline are divided with its denoisers: two processes against one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch

import xdit_ir as xir
from xdit_ir.porting.methods import PortedMethod

Pools = Callable[[int], Any]


@pytest.mark.parametrize("kind", ["plain", "tiling"])
def test_an_autoencoder_on_two_processes_is_that_of_one(workers: Pools, kind: str) -> None:
    for answer in workers(2).run("parts", kind=kind, pays=False):
        assert isinstance(answer["error"], float), answer
        assert answer["error"] <= 1e-5, answer
        assert min(answer["programs"]) == 1
        assert kind == "tiling" or answer["share"] <= 0.54


@pytest.mark.parametrize("kind", [{"ulysses": 2}, {"pipefusion": 2, "warmup_steps": 2}])
def test_images_of_a_pipeline_are_those_of_one_process(workers: Pools, kind: dict[str, int]) -> None:
    for answer in workers(2).run("whole_images", degrees=kind):
        assert isinstance(answer["error"], float), answer
        assert answer["error"] <= 1e-4 and answer["spread"] > 0.01, answer
        assert answer["share"] <= 0.54


def test_what_does_not_pay_runs_whole_and_says_so(workers: Pools) -> None:
    for answer in workers(2).run("parts", kind="plain", pays=True):
        assert answer["error"] == 0
        assert "ran whole on every rank: dividing it saves at most" in answer["whole"], answer


def test_a_pipeline_is_timed_by_phase_alone_and_ported(workers: Pools) -> None:
    for answer in workers(2).run("timed", name="wan2.1-t2v-14b:tiny", degrees="u2"):
        assert answer.get("status") == "equal" and 0 <= answer["error"] < 1e-4, answer
        assert answer["parts"]["transformer"]["shares"][0] == answer["parts"]["transformer"]["shares"][1] < 0.6
        for seconds in (answer[name]["seconds"] for name in ("alone", "ported")):
            assert list(seconds) == ["encode", "denoise", "decode", "total"]
            assert all(0 < phase["min"] <= phase["median"] <= phase["max"] for phase in seconds.values())
        assert [phase for phase in answer["ported"]["first"] if phase not in answer["alone"]["first"]] == ["port"]
        assert "saves at most" in answer["parts"]["vae.decode"]["whole"]
        assert answer["decoders"] == 1, "what does not pay is tried once, whatever it leaves in its attributes"


@pytest.fixture
def pipe() -> Any:
    return pipelines.with_autoencoder()


def test_only_what_is_named_is_ported(pipe: Any) -> None:
    transformer = pipe.transformer
    xir.port(pipe, components=["vae"])
    assert pipe.transformer is transformer
    assert isinstance(pipe.vae.decode, PortedMethod) and isinstance(pipe.vae.encode, PortedMethod)


def test_a_ported_method_looks_like_the_original(pipe: Any) -> None:
    signature, weights = inspect.signature(pipe.vae.decode), list(pipe.vae.state_dict())
    xir.port(pipe, components=["vae"])
    assert inspect.signature(pipe.vae.decode) == signature
    assert pipe.vae.decode.__name__ == "decode" and pipe.vae.decode.__self__ is pipe.vae
    assert list(pipe.vae.state_dict()) == weights
    assert copy.deepcopy(pipe.vae).decode.__self__ is not pipe.vae


def test_changes_of_the_module_are_noticed(pipe: Any) -> None:
    latents = torch.randn(2, 4, 32, 24)
    xir.port(pipe, components=["vae"])
    with torch.no_grad():
        pipe.vae.decode(latents)
        pipe.vae.decode(latents + 1)
        assert len(pipe.vae.decode.programs) == 1
        pipe.vae.enable_slicing()
        sliced = pipe.vae.decode(latents).sample
        want = pipe.vae.decode.original(latents).sample
    assert len(pipe.vae.decode.programs) == 2
    torch.testing.assert_close(sliced, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("components", "message"),
    [(["unet"], "no module 'unet'; its modules: vae, transformer"), ("vae", r"expected a list of names.*\['vae'\]")],
)
def test_names_of_nothing_are_refused(pipe: Any, components: Any, message: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=message):
        xir.port(pipe, components=components)


def test_a_method_is_not_ported_twice(pipe: Any) -> None:
    xir.port(pipe, components=["vae"])
    with pytest.raises(xir.ParallelizeError, match=r"decode is ported already|encode is ported already"):
        xir.port(pipe, components=["vae"])


def test_under_offload_hooks_a_method_runs_whole_and_says_so(pipe: Any) -> None:
    latents = torch.randn(1, 4, 32, 24)
    xir.port(pipe, components=["vae"])
    pipe.vae._hf_hook = object()
    with torch.no_grad():
        assert torch.equal(pipe.vae.decode(latents).sample, pipe.vae.decode.original(latents).sample)
    with pytest.raises(xir.ParallelizeError, match="ran whole on every rank: AutoencoderKL has a hook of accelerate"):
        pipe.vae.decode.report()

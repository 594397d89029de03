"""Decoders and encoders of a pipeline are divided with its denoisers: two processes against one."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch

import xdit_ir as xir
from xdit_ir.porting.methods import PortedMethod
from xdit_ir.porting.ported import Ported

Pools = Callable[[int], Any]


@pytest.mark.parametrize("kind", ["plain", "tiling"])
def test_an_autoencoder_on_two_processes_is_that_of_one(workers: Pools, kind: str) -> None:
    for answer in workers(2).run("parts", kind=kind, pays=False):
        assert isinstance(answer["error"], float), answer
        assert answer["error"] <= 1e-5, answer
        assert min(answer["programs"]) == 1
        assert kind == "tiling" or answer["share"] <= 0.54


def test_four_processes_are_a_grid_where_that_costs_less(request: pytest.FixtureRequest, workers: Pools) -> None:
    """By one communicator, whatever the mesh of a program is."""
    if not request.config.getoption("--large"):
        pytest.skip("four processes (--large)")
    for answer in workers(4).run("in_a_grid", machine="bytes=1e7"):
        assert answer["programs"] == 2, answer
        for name, mesh in (("square", {"ring": 2, "ulysses": 2}), ("high", {"ulysses": 4}), ("again", None)):
            assert answer[name]["error"] <= 1e-5, answer
            assert answer[name]["mesh"] == (mesh or answer["square"]["mesh"]), answer
            assert answer[name]["share"] <= 0.30, answer


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


@pytest.mark.parametrize(
    "degrees", [{"ulysses": 2, "shard_weights": True}, {"cfg": 2, "stream_weights": True}], ids=str
)
def test_encoders_of_texts_divide_their_weights_with_the_denoiser(
    request: pytest.FixtureRequest, workers: Pools, degrees: dict[str, Any]
) -> None:
    """Each rank has a half of all; nothing is left in the modules."""
    everything = request.config.getoption("--pipelines-all")
    if "stream_weights" in degrees and not everything:
        pytest.skip("as with parts on the GPU (--pipelines-all)")
    names = ["clip-text", "t5", *(["umt5", "llama", "qwen2.5-vl", "qwen3", "gemma2"] if everything else [])]
    for answer in workers(2).run("encoders_in_parts", names=names, degrees=degrees):
        assert list(answer) == ["transformer", *names], answer
        for name, found in answer.items():
            assert found["error"] <= 1e-5 and found["held"] <= 0.54 and found["resident"] == 0, (name, found)


def test_an_encoder_that_cannot_be_divided_runs_whole_and_says_so() -> None:
    """As long as it has weights; once it has given them up, a call that cannot be divided is refused by name."""
    pipe, calls = pipelines.with_encoders(["llama"])
    encoder, given = pipe.llama, calls["llama"]
    forward = encoder.forward

    @functools.wraps(forward)
    def once(streamed: bool = False, **kwargs: Any) -> Any:
        return iter(forward(**kwargs)) if streamed else forward(**kwargs)

    encoder.forward = once
    xir.port(pipe, stream_weights=True)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="runs whole, with all of its weights: forward returns a tuple_iterator"):
            [whole, *_] = pipe.llama(**given, streamed=True)
        with pytest.raises(xir.ParallelizeError, match="the last call ran whole on every rank"):
            pipe.llama.report()
        assert not any(x.is_meta for x in encoder.parameters())
        divided = pipe.llama(**given)
        torch.testing.assert_close(divided[0], whole)
        assert pipe.llama.report().gathered.uploaded and all(x.is_meta for x in encoder.parameters())
        with pytest.raises(xir.XditError, match=r"cannot be divided, and weights are divided already: .*iterator"):
            pipe.llama(**given, streamed=True)


def test_keys_and_values_that_an_encoder_returns_in_a_cache_are_followed() -> None:
    """As encoders of transformers do where nothing is said of `use_cache`."""
    pipe, calls = pipelines.with_encoders(["llama"])
    given = calls["llama"] | {"use_cache": True, "return_dict": True}
    with torch.no_grad():
        want = pipe.llama(**given)
        parallel = xir.trace(pipe.llama, given).parallelize(ulysses=2)
        found = parallel.simulate(pipe.llama, given)[1]
    assert parallel.report().share <= 0.54
    torch.testing.assert_close(found.last_hidden_state, want.last_hidden_state)
    kept, wanted = found.past_key_values, want.past_key_values
    assert type(kept) is type(wanted) and kept.get_seq_length() == wanted.get_seq_length() > 0
    for mine, other in zip(kept.layers, wanted.layers, strict=True):
        torch.testing.assert_close((mine.keys, mine.values), (other.keys, other.values))


def test_only_encoders_of_texts_and_what_is_named_give_weights_up() -> None:
    pipe, _ = pipelines.with_encoders(["clip-vision", "t5"])
    image, text = pipe.components["clip-vision"], pipe.t5
    xir.port(pipe, stream_weights="1MiB")
    assert pipe.components["clip-vision"] is image and isinstance(pipe.t5, Ported)
    assert pipe.t5._xdit_specialisations.schedule["stream_weights"] is True, "what stays is for the denoiser"
    pipe, _ = pipelines.with_encoders(["t5"])
    text = pipe.t5
    xir.port(pipe, components=["transformer"], stream_weights=True)
    assert pipe.t5 is text


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

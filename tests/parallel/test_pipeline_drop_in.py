"""What a ported pipeline is to code that knows only the original; one process, one rank."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import diffusers.models.autoencoders
import diffusers.models.transformers
import pytest
import torch
from flux_pipeline import build_pipeline, generate
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.porting.denoisers import takes_timestep
from xdit_ir.porting.ported import Ported

STEPS = 2


@pytest.fixture
def pipe() -> Any:
    return build_pipeline()


def ported(pipe: Any) -> list[str]:
    return [name for name, component in pipe.components.items() if isinstance(component, Ported)]


def two_experts() -> Any:
    first, second = (models.load("wan2.1-t2v-14b:tiny", seed=seed)[0] for seed in (0, 1))
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.5,
    )


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_pipeline_is_ported_in_place(pipe: Any) -> None:
    want, config, others = generate(pipe, STEPS), dict(pipe.config), [pipe.vae, pipe.scheduler]
    assert xir.port(pipe) is pipe
    assert ported(pipe) == ["transformer"]
    assert dict(pipe.config) == config and [pipe.vae, pipe.scheduler] == others
    assert pipe.device.type == "cpu" and pipe.dtype == torch.float32
    close(generate(pipe, STEPS), want)
    assert pipe.to(torch.float64) is pipe and pipe.dtype == pipe.transformer.dtype == torch.float64
    assert len(pipe.transformer.programs) == 1


def test_both_experts_are_found() -> None:
    pipe = xir.port(two_experts())
    assert ported(pipe) == ["transformer", "transformer_2"]
    assert pipe.transformer._xdit_original is not pipe.transformer_2._xdit_original
    assert ported(xir.port(two_experts(), denoisers=["transformer_2"])) == ["transformer_2"]


def test_a_module_under_two_names_gets_one_stand_in() -> None:
    pipe = two_experts()
    pipe.transformer_2 = pipe.transformer
    xir.port(pipe)
    assert isinstance(pipe.transformer, Ported) and pipe.transformer is pipe.transformer_2


def test_any_object_with_components() -> None:
    class Holder:
        def __init__(self) -> None:
            self.net, self.encoder = models.load("pixart-sigma:tiny")[0], nn.Linear(2, 2)

        @property
        def components(self) -> dict[str, Any]:
            return {"net": self.net, "encoder": self.encoder, "tokenizer": None}

    holder = xir.port(Holder())
    assert isinstance(holder.net, Ported) and type(holder.encoder) is nn.Linear


def test_the_rule_tells_denoisers_from_what_runs_outside_the_loop() -> None:
    """A timestep is what all denoisers of diffusers have, and no autoencoder."""

    def modules(package: Any) -> dict[str, Any]:
        found = inspect.getmembers(package, inspect.isclass)
        return {name: kind for name, kind in found if issubclass(kind, nn.Module) and name != "ModelMixin"}

    denoisers = modules(diffusers.models.transformers)
    assert len(denoisers) > 60
    assert {name for name, kind in denoisers.items() if not takes_timestep(kind)} <= {
        "DualTransformer2DModel",  # a part of a UNet
        "MiniMaxMusic3RVQDepthDecoder",  # runs after the denoising steps
    }
    autoencoders = modules(diffusers.models.autoencoders)
    assert len(autoencoders) > 20 and not any(map(takes_timestep, autoencoders.values()))


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (build_pipeline, {"denoisers": ["unet"]}, "no module 'unet'; its modules: vae, transformer"),
        (build_pipeline, {"denoisers": "transformer"}, r"expected a list of names.*\['transformer'\]"),
        (build_pipeline, {"components": ["transfomer"]}, "did you mean 'transformer'"),
        (build_pipeline, {"components": 3}, "components=3: expected a list of names"),
        (build_pipeline, {"denoisers": 3}, "denoisers=3: expected a list of names"),
        (build_pipeline, {"ulises": 2}, "ulises"),
        (lambda: xir.port(build_pipeline()), {}, "ported already"),
        (lambda: nn.Linear(2, 2), {"denoisers": ["a"]}, "a module was given"),
        (lambda: 3, {}, "a module, or a pipeline with a mapping `components`.*int"),
        (lambda: SimpleNamespace(components={"vae": nn.Linear(2, 2)}), {}, "takes a timestep.*its modules: vae"),
    ],
)
def test_what_is_refused(make: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(xir.ParallelizeError, match=named):
        xir.port(make(), **options)


def test_a_refused_pipeline_is_as_before() -> None:
    """A holder whose components cannot be replaced is noticed."""
    net = models.load("pixart-sigma:tiny")[0]
    with pytest.raises(xir.ParallelizeError, match="does not take another module as its attribute 'net'"):
        xir.port(SimpleNamespace(components={"net": net}))
    pipe = two_experts()
    pipe.transformer_2 = xir.port(pipe.transformer_2)
    with pytest.raises(xir.ParallelizeError, match="ported already"):
        xir.port(pipe)
    assert ported(pipe) == ["transformer_2"]


def test_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    """A folder that a ported pipeline wrote is that of the pipeline."""
    want = generate(pipe, STEPS)
    absent = {name: None for name, component in pipe.components.items() if component is None}
    xir.port(pipe).save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, **absent)
    close(generate(xir.port(again), STEPS), want)


@pytest.mark.parametrize("how", ["weights", "release"])
def test_a_port_that_holds_its_weights_is_where_it_runs(pipe: Any, tmp_path: Path, how: str) -> None:
    """Each component reads its own folder; moving such a pipeline leaves what is on the meta device there."""
    want = generate(pipe, STEPS)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    if how == "weights":
        pipe.transformer.to("meta")
    xir.port(pipe, **({"weights": tmp_path} if how == "weights" else {"release": True}))
    for _ in range(2):
        assert pipe.to("cpu") is pipe and pipe.transformer.cpu() is pipe.transformer
        assert pipe.transformer.device.type == pipe.device.type == "cpu"
        close(generate(pipe, STEPS), want)
        assert all(tensor.is_meta for tensor in pipe.transformer.parameters())
    assert len(pipe.transformer.programs) == 1
    pipe.transformer.to(torch.float64)
    assert pipe.transformer.dtype == torch.float64
    with pytest.raises(xir.MismatchError, match=r"cast from torch\.float32 to torch\.float64"):
        generate(pipe, STEPS)


def test_model_offloading_after_port(pipe: Any) -> None:
    """Hooks of the stand-in move the original's weights before forward, and back after a call."""
    want = generate(pipe, STEPS)
    xir.port(pipe).enable_model_cpu_offload(device="cpu")
    assert pipe.transformer._hf_hook is not None and not hasattr(pipe.transformer._xdit_original, "_hf_hook")
    for _ in range(2):
        close(generate(pipe, STEPS), want)
    assert len(pipe.transformer.programs) == 1


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_before_port_is_refused(pipe: Any, how: str) -> None:
    getattr(pipe, how)(device="cpu")
    with pytest.raises(xir.ParallelizeError, match=r"offload.*port first"):
        xir.port(pipe)


def test_offloading_piece_by_piece_after_port_is_refused(pipe: Any) -> None:
    xir.port(pipe).enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(xir.MismatchError, match="moved to the device piece by piece"):
        generate(pipe, STEPS)


def test_what_holds_its_weights_refuses_adapters(pipe: Any, tmp_path: Path) -> None:
    """A layer that is put around one of the checkpoint would hide it: said, and not ignored."""
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    xir.port(pipe, weights=tmp_path)
    generate(pipe, STEPS)

    class Around(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.more = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.more(x)

    pipe.transformer.to("meta")
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.to_q = Around(attention.to_q)
    with pytest.raises(xir.MismatchError, match=r"has no tensor '.*to_q\.base\.weight'"):
        generate(pipe, STEPS)


def test_another_pipeline_takes_its_components() -> None:
    """Pipelines of diffusers compare exact types: one made of another has the same port."""
    pipe = xir.port(build_pipeline())
    kind = type(pipe.transformer._xdit_original)
    assert type(pipe.transformer) == kind and kind == type(pipe.transformer) and type(pipe.transformer) in {kind}  # noqa: E721
    assert type(pipe.transformer) != type(pipe.scheduler)  # noqa: E721
    other = type(pipe).from_pipe(pipe)
    assert other.transformer is pipe.transformer

"""Unmodified diffusers pipelines around tiny transformers with random weights, and the arguments of a call.

Prompt embeddings are passed, so there are no text encoders; where a pipeline encodes an image it has a tiny VAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from flux_pipeline import build_pipeline

from xdit_ir import models

SIZE = 256  # pixels; 32 x 32 latents
Case = tuple[Any, dict[str, Any]]


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _transformer(name: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny transformer of the zoo, with some of its configuration changed."""
    if not changes:
        return models.load(f"{name}:tiny", seed=seed)[0]
    entry = models.entry(name)
    return models.randomize(getattr(diffusers, entry.cls)(**{**entry.tiny, **changes}).eval(), seed)


def _assembled(kind: Any, transformer: Any, scheduler: Any, **parts: Any) -> Any:
    """A pipeline without those of its parts that are not given."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    absent = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    return kind(**absent | {"transformer": transformer, "scheduler": scheduler} | parts)


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def _unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def _guided(*seeds: int, tokens: int = 16, masks: str = "") -> dict[str, Any]:
    """A prompt, another one for guidance, and their masks under the name that the pipeline gives them."""
    found: dict[str, Any] = {}
    for kind, seed in zip(("", "negative_"), seeds, strict=False):
        found[f"{kind}prompt_embeds"] = _noise(seed, 1, tokens, 32)
        if masks:
            found[f"{kind}{masks}"] = torch.ones(1, tokens, dtype=torch.bool)
    return found


def _image(size: int = SIZE) -> dict[str, Any]:
    return {"height": size, "width": size, "output_type": "latent"}


def _video(frames: int = 13) -> dict[str, Any]:
    return {"height": 128, "width": 128, "num_frames": frames, "output_type": "latent"}


def _picture(size: int = SIZE) -> Any:
    image = diffusers.image_processor.VaeImageProcessor
    return image.numpy_to_pil(image.pt_to_numpy(_noise(9, 1, 3, size, size).sigmoid()))[0]


def flux() -> Case:
    """One call per step, whole batch."""
    pipe = _assembled(diffusers.FluxPipeline, _transformer("flux.1-dev"), _flow())
    return pipe, _guided(1) | {"pooled_prompt_embeds": _noise(2, 1, 24), "max_sequence_length": 16} | _image()


def kontext() -> Case:
    """The tokens of an image to edit behind those of the latents."""
    pipe = diffusers.FluxKontextPipeline(**build_pipeline().components)
    own = {"image": _picture(), "_auto_resize": False, "max_area": SIZE**2, "pooled_prompt_embeds": _noise(2, 1, 24)}
    return pipe, _guided(1) | own | _image()


def img2img() -> Case:
    """Begins with the latents of an image, in the middle of the schedule."""
    pipe = diffusers.FluxImg2ImgPipeline(**build_pipeline().components)
    own = {"image": _picture(), "strength": 0.99, "pooled_prompt_embeds": _noise(2, 1, 24)}
    return pipe, _guided(1) | own | _image()


def flux2() -> Case:
    """Positions of four axes."""
    return _assembled(diffusers.Flux2Pipeline, _transformer("flux.2-dev"), _flow()), _guided(1) | _image()


def sd3() -> Case:
    """Both halves of guidance in one batch."""
    pipe = _assembled(diffusers.StableDiffusion3Pipeline, _transformer("sd3.5-large"), _flow())
    pooled = {"pooled_prompt_embeds": _noise(3, 1, 24), "negative_pooled_prompt_embeds": _noise(4, 1, 24)}
    return pipe, _guided(1, 2) | pooled | _image()


def pixart() -> Case:
    """An output of twice the channels of the latents."""
    transformer = _transformer("pixart-sigma")
    pipe = _assembled(diffusers.PixArtSigmaPipeline, transformer, diffusers.DPMSolverMultistepScheduler())
    prompts = _guided(1, 2, masks="prompt_attention_mask")
    return pipe, prompts | {"negative_prompt": None, "use_resolution_binning": False} | _image()


def sana() -> Case:
    """Linear attention."""
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = _assembled(diffusers.SanaPipeline, _transformer("sana-1600m"), scheduler)
    prompts = _guided(1, 2, masks="prompt_attention_mask")
    return pipe, prompts | {"negative_prompt": None, "use_resolution_binning": False} | _image(512)


def qwen() -> Case:
    """Guidance by two calls per step, with prompts of other lengths."""
    pipe = _assembled(diffusers.QwenImagePipeline, _transformer("qwen-image"), _flow(use_dynamic_shifting=True))
    negative = _guided(2, tokens=11, masks="prompt_embeds_mask")
    negative = {f"negative_{name}": value for name, value in negative.items()}
    return pipe, _guided(1, masks="prompt_embeds_mask") | negative | {"true_cfg_scale": 4.0} | _image()


def qwen_edit() -> Case:
    """An image to edit, which the pipeline brings to 1024 x 1024: the VAE makes 32 x 32 latents of that."""
    flat = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    levels = {"dim_mult": [1] * 6, "temperal_downsample": [False] * 5, "num_res_blocks": 1}
    vae = models.randomize(diffusers.AutoencoderKLQwenImage(base_dim=2, z_dim=4, **levels, **flat).eval())
    transformer, scheduler = _transformer("qwen-image"), _flow(use_dynamic_shifting=True)
    pipe = _assembled(diffusers.QwenImageEditPipeline, transformer, scheduler, vae=vae)
    prompts = _guided(1, 2, masks="prompt_embeds_mask")
    return pipe, prompts | {"image": _picture(64), "true_cfg_scale": 4.0} | _image(1024)


def zimage() -> Case:
    """Lists of samples of other lengths."""
    pipe = _assembled(diffusers.ZImagePipeline, _transformer("z-image"), _flow())
    prompts = {"prompt_embeds": [_noise(1, 40, 32)], "negative_prompt_embeds": [_noise(2, 11, 32)]}
    return pipe, prompts | _image()


def lumina2() -> Case:
    """Valid text and image packed into one sequence."""
    pipe = _assembled(diffusers.Lumina2Pipeline, _transformer("lumina-2"), _flow())
    return pipe, _guided(1, 2, masks="prompt_attention_mask") | _image()


def wan() -> Case:
    """Guidance by two calls per step."""
    return _assembled(diffusers.WanPipeline, _transformer("wan2.1-t2v-14b"), _unipc()), _guided(1, 2) | _video()


def wan22() -> Case:
    """Two transformers, each for a part of the steps."""
    first, second = (_transformer("wan2.1-t2v-14b", seed) for seed in (0, 1))
    pipe = _assembled(diffusers.WanPipeline, first, _unipc(), transformer_2=second, boundary_ratio=0.9)
    return pipe, _guided(1, 2) | _video()


def wan_i2v() -> Case:
    """A first frame beside the latents, and its features in cross-attention."""
    flat = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **flat).eval()
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8)).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {"vae": models.randomize(vae), "image_encoder": models.randomize(encoder), "image_processor": processor}
    transformer = _transformer("wan2.1-t2v-14b", in_channels=12, image_dim=24, added_kv_proj_dim=64)
    pipe = _assembled(diffusers.WanImageToVideoPipeline, transformer, _unipc(), **parts)
    prompts = _guided(1, 2, tokens=512)  # the class takes the last 512 tokens for text, whatever their number
    return pipe, prompts | {"image": _picture(128)} | _video()


def cogvideo() -> Case:
    """A scheduler that is stepped by itself, and frames before channels."""
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return _assembled(diffusers.CogVideoXPipeline, _transformer("cogvideox-5b"), scheduler), _guided(1, 2) | _video()


def hunyuanvideo() -> Case:
    """Masked text that is refined first; true guidance by two calls."""
    pipe = _assembled(diffusers.HunyuanVideoPipeline, _transformer("hunyuanvideo"), _flow())
    prompts = _guided(1, 2, masks="prompt_attention_mask")
    pooled = {"pooled_prompt_embeds": _noise(3, 1, 24), "negative_pooled_prompt_embeds": _noise(4, 1, 24)}
    return pipe, prompts | pooled | {"true_cfg_scale": 2.0} | _video()


def ltx() -> Case:
    """Packed video tokens with positions in pixels and seconds."""
    pipe = _assembled(diffusers.LTXPipeline, _transformer("ltx-video"), _flow(use_dynamic_shifting=True))
    return pipe, _guided(1, 2, masks="prompt_attention_mask") | _video(25) | {"height": SIZE, "width": SIZE}


def hunyuandit() -> Case:
    """Long skips."""
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    transformer, scheduler = _transformer("hunyuandit"), diffusers.DDPMScheduler()
    pipe = _assembled(diffusers.HunyuanDiTPipeline, transformer, scheduler, **parts)
    embeds = {
        f"{kind}prompt_{what}{which}": value
        for kind, seed in (("", 1), ("negative_", 2))
        for which, length, width in (("", 6, 32), ("_2", 10, 16))
        for what, value in (("embeds", _noise(seed, 1, length, width)), ("attention_mask", torch.ones(1, length)))
    }
    return pipe, embeds | {"use_resolution_binning": False} | _image()


def flux_controlnet() -> Case:
    """A second denoiser, whose results are arguments of the transformer."""
    parts = build_pipeline().components
    small = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    net = diffusers.FluxControlNetModel.from_transformer(parts["transformer"], **small).eval()
    pipe = diffusers.FluxControlNetPipeline(**parts, controlnet=models.randomize(net, 1))
    own = {"control_image": _picture(), "pooled_prompt_embeds": _noise(2, 1, 24), "controlnet_conditioning_scale": 0.7}
    return pipe, _guided(1) | own | _image()


def sd3_controlnet() -> Case:
    """The same with both halves of guidance in one batch."""
    parts = {"vae": build_pipeline().vae, "transformer": _transformer("sd3.5-large")}
    entry = models.entry("sd3.5-large")
    net = diffusers.SD3ControlNetModel(**{**entry.tiny, "num_layers": 2}).eval()
    kind = diffusers.StableDiffusion3ControlNetPipeline
    pipe = _assembled(kind, scheduler=_flow(), controlnet=models.randomize(net, 1), **parts)
    pooled = {"pooled_prompt_embeds": _noise(3, 1, 24), "negative_pooled_prompt_embeds": _noise(4, 1, 24)}
    return pipe, _guided(1, 2) | pooled | {"control_image": _picture()} | _image()


def flux_ip_adapter() -> Case:
    """The features of an image in attentions of their own."""
    pipe, call = flux()
    shapes = {"proj.weight": (4 * 32, 24), "proj.bias": (4 * 32,), "norm.weight": (32,), "norm.bias": (32,)}
    projection = {name: _noise(7, *shape) for name, shape in shapes.items()}
    layers = {
        f"{index}.to_{part}_ip.{kind}": _noise(index, *shape) * 0.3
        for index in range(2)
        for part in "kv"
        for kind, shape in (("weight", (64, 32)), ("bias", (64,)))
    }
    weights = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(weights, None, image_encoder_pretrained_model_name_or_path=None)
    return pipe, call | {f"{kind}ip_adapter_image_embeds": [_noise(8, 1, 1, 24)] for kind in ("", "negative_")}


IMAGES = (flux, kontext, img2img, flux2, sd3, pixart, hunyuandit, sana, qwen, qwen_edit, zimage, lumina2)
ADDED = (flux_controlnet, sd3_controlnet, flux_ip_adapter)
VIDEOS = (wan, wan22, wan_i2v, cogvideo, hunyuanvideo, ltx)
BUILDERS: dict[str, Callable[[], Case]] = {builder.__name__: builder for builder in (*IMAGES, *ADDED, *VIDEOS)}


def with_autoencoder() -> Any:
    """A pipeline of which the autoencoder matters."""
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.1,
    )
    return _assembled(diffusers.FluxPipeline, _transformer("flux.1-dev"), _flow(), vae=models.randomize(vae.eval()))


class Bare:
    """What `port` takes for a pipeline: modules by name, which are attributes too."""

    def __init__(self, **modules: Any) -> None:
        self.names = list(modules)
        vars(self).update(modules)

    @property
    def components(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.names}


def with_encoders(names: list[str]) -> tuple[Bare, dict[str, dict[str, Any]]]:
    """A denoiser and these encoders of the zoo, and arguments for each."""
    transformer, example = models.load("pixart-sigma:tiny")
    loaded = {name: models.load_part(name, "forward") for name in names}
    modules = {name: method.__self__ for name, (method, _) in loaded.items()}  # type: ignore[attr-defined]
    calls = {"transformer": example, **{name: given for name, (_, given) in loaded.items()}}
    return Bare(transformer=transformer, **modules), calls

"""Train the digits pipeline and its classifier: minutes on one GPU.

    python -m xdit_ir.models.digits.train --output build/digits

The pictures are scikit-learn's `load_digits` (1797 of 8 x 8 pixels), or any `--data FILE.npz` with `images`
[N, 8, 8] (0 to 16) and `labels` [N]; enlarged to 64 x 64 and moved, turned and sized a little at random. Every fifth is
kept from training and tells how good the classifier is. The DiT predicts v (Salimans and Ho, arXiv 2202.00512) under a
schedule that ends in pure noise (Lin et al., arXiv 2305.08891); one label in ten is dropped for guidance (Ho and
Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from xdit_ir.models.digits.classifier import Classifier

SIZE, LATENTS, NOBODY = 64, 16, 1000  # pixels; rows of latents; the label that DiTPipeline takes for "no class"
Step = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Digits:
    """Pictures [N, 1, 64, 64] in [0, 1] and their labels [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    @staticmethod
    def read(path: Path | None, device: torch.device) -> Digits:
        """From a file, or from scikit-learn."""
        if path is None:
            from sklearn.datasets import load_digits

            found = load_digits()
            images, labels = found.images, found.target
        else:
            stored = np.load(path)
            images, labels = stored["images"], stored["labels"]
        small = torch.as_tensor(np.asarray(images), dtype=torch.float32)[:, None] / 16
        large = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
        return Digits(large.to(device), torch.as_tensor(np.asarray(labels), dtype=torch.int64).to(device))

    def split(self) -> tuple[Digits, Digits]:
        """Four fifths to train with, one fifth to judge by."""
        held_out = torch.arange(len(self.labels), device=self.labels.device) % 5 == 4
        return Digits(self.images[~held_out], self.labels[~held_out]), Digits(
            self.images[held_out], self.labels[held_out]
        )

    def batch(self, size: int) -> Digits:
        """Random pictures, each turned by up to 8 degrees, moved by up to 2 pixels and sized by up to 6 %."""
        chosen = torch.randint(len(self.labels), (size,), device=self.labels.device)
        images = self.images[chosen]
        turn, dx, dy, zoom = (2 * torch.rand(4, size, device=images.device) - 1).unbind()
        turn, zoom = turn * math.pi * 8 / 180, 1 + 0.06 * zoom
        rows = (
            torch.stack([turn.cos() * zoom, -turn.sin() * zoom, dx / 16]),
            torch.stack([turn.sin() * zoom, turn.cos() * zoom, dy / 16]),
        )
        grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(images.shape), align_corners=False)
        return Digits(F.grid_sample(images, grid, align_corners=False), self.labels[chosen])


def optimise(parameters: Iterator[nn.Parameter], step: Step, steps: int, rate: float, what: str) -> Iterator[int]:
    """AdamW on what `step` returns, with a warm-up and a cosine to zero; yields after each update."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min(1.0, (n + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * n / steps))
    )
    start = time.perf_counter()
    for number in range(steps):
        loss = step(number)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if (number + 1) % max(1, steps // 10) == 0:
            print(f"{what}: step {number + 1}, loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)
        yield number


def train_classifier(digits: Digits, steps: int, device: torch.device) -> Classifier:
    """A classifier of pictures."""
    classifier = Classifier().to(device)

    def step(_: int) -> torch.Tensor:
        some = digits.batch(256)
        return F.cross_entropy(classifier(some.images), some.labels, label_smoothing=0.05)

    for _ in optimise(classifier.parameters(), step, steps, 2e-3, "classifier"):
        pass
    return classifier.eval()


def train_vae(digits: Digits, steps: int, device: torch.device) -> Any:
    """An AutoencoderKL whose latents, once scaled, have variance 1."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    ).to(device)

    def step(_: int) -> torch.Tensor:
        images = 2 * digits.batch(128).images - 1
        latents = vae.encode(images).latent_dist
        found = vae.decode(latents.sample()).sample
        divergence: torch.Tensor = latents.kl().mean() / latents.mean[0].numel()
        return F.l1_loss(found, images) + F.mse_loss(found, images) + 1e-4 * divergence

    for _ in optimise(vae.parameters(), step, steps, 1e-3, "vae"):
        pass
    with torch.no_grad():
        scale = 1 / vae.encode(2 * digits.batch(512).images - 1).latent_dist.sample().std().item()
    vae.register_to_config(scaling_factor=round(scale, 4))
    return vae.eval().requires_grad_(False)


def scheduler() -> Any:
    """The schedule of training and, with fewer steps, of generation."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def transformer() -> Any:
    """The DiT before training: gates and output start from zero (adaLN-Zero)."""
    from diffusers import DiTTransformer2DModel

    dit: Any = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=LATENTS,
        patch_size=1,
        num_embeds_ada_norm=NOBODY,
    )
    for linear in (*(block.norm1.linear for block in dit.transformer_blocks), dit.proj_out_1, dit.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for block in dit.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    return dit.eval()  # labels are dropped here, for all blocks together


def train_transformer(digits: Digits, vae: Any, steps: int, batch: int, device: torch.device) -> Any:
    """A DiT: the running mean of the weights of all steps."""
    dit = transformer().to(device)
    mean = copy.deepcopy(dit).requires_grad_(False)
    alphas = scheduler().alphas_cumprod.to(device)
    predict = torch.compile(dit) if device.type == "cuda" else dit

    def step(_: int) -> torch.Tensor:
        some = digits.batch(batch)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            clean = vae.encode(2 * some.images - 1).latent_dist.sample().float() * vae.config.scaling_factor
        labels = torch.where(torch.rand(batch, device=device) < 0.1, NOBODY, some.labels)
        times = torch.randint(1000, (batch,), device=device)
        signal, noisy = (part[times, None, None, None] for part in (alphas.sqrt(), (1 - alphas).sqrt()))
        noise = torch.randn_like(clean)
        with torch.autocast(device.type, torch.bfloat16):
            found = predict(signal * clean + noisy * noise, timestep=times, class_labels=labels).sample
        return F.mse_loss(found.float(), signal * noise - noisy * clean)

    for number in optimise(dit.parameters(), step, steps, 1e-3, "transformer"):
        share = 1 - min(0.9995, (number + 1) / (number + 10))
        torch._foreach_lerp_(list(mean.parameters()), list(dit.parameters()), share)
    return mean


@torch.no_grad()
def judge(pipe: Any, classifier: Classifier, images: int, device: torch.device) -> float:
    """How many of newly made digits the classifier recognises."""
    labels = torch.arange(images) % 10
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        labels.tolist(),
        guidance_scale=2.0,
        num_inference_steps=20,
        output_type="pt",
        generator=torch.Generator(device).manual_seed(1),
    ).images
    return classifier.accuracy(made, labels)


def main() -> None:
    """Train everything and write it to a folder."""
    from diffusers import DiTPipeline
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="npz with images [N, 8, 8] and labels [N] (default: scikit-learn's)")
    parser.add_argument("--output", type=Path, default=Path("build/digits"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12000, help="of the transformer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="of the transformer (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train, held_out = Digits.read(args.data, device).split()

    classifier = train_classifier(train, max(1, args.steps // 8), device)
    print(f"classifier: {classifier.accuracy(held_out.images, held_out.labels):.4f} of held-out digits", flush=True)
    vae = train_vae(train, max(1, args.steps // 4), device)
    with torch.no_grad():
        seen_again = vae.decode(vae.encode(2 * held_out.images - 1).latent_dist.mode()).sample / 2 + 0.5
    print(
        f"vae: {(seen_again - held_out.images).abs().mean():.4f} mean difference, "
        f"{classifier.accuracy(seen_again, held_out.labels):.4f} recognised",
        flush=True,
    )
    dit = train_transformer(train, vae, args.steps, args.batch, device)

    pipe: Any = DiTPipeline(transformer=dit.half(), vae=vae.half(), scheduler=scheduler())
    pipe.save_pretrained(args.output / "pipeline")
    weights = {name: value.half().contiguous().cpu() for name, value in classifier.state_dict().items()}
    save_file(weights, args.output / "classifier.safetensors")
    pipe = DiTPipeline.from_pretrained(args.output / "pipeline", dtype=torch.float32).to(device)
    print(
        f"made digits: {judge(pipe, classifier, 1000 if device.type == 'cuda' else 20, device):.4f} recognised",
        flush=True,
    )


if __name__ == "__main__":
    main()

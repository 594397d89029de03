"""Small decoders and encoders as research code writes them, each with one thing that windows or parts of them do.

Each is exact, shared evenly, and gathers nothing; one number of ranks each, `--zoo-all` runs all of them under 2, 3, 4
and on a grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir
from xdit_ir import Machine
from xdit_ir.checking.check import check_parallel

SLOW = Machine(bytes=1e7)
DEGREES: tuple[dict[str, int], ...] = ({"ulysses": 2}, {"ulysses": 3}, {"ulysses": 4}, {"ring": 2, "ulysses": 2})
SHARES = {2: 0.54, 3: 0.40, 4: 0.30}


def convs(*channels: int, kernel: int = 3, **options: str) -> nn.ModuleList:
    pairs = itertools.pairwise(channels)
    return nn.ModuleList(nn.Conv2d(a, b, kernel, padding=kernel // 2, **options) for a, b in pairs)  # type: ignore[arg-type]


class Texture(nn.Module):
    """Padded around, and resized from corner to corner."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = convs(4, 16, 16, 3, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs[:-1]:
            x = F.interpolate(F.silu(conv(x)), scale_factor=2, mode="bicubic", align_corners=True)
        return self.convs[-1](x)


class Panorama(nn.Module):
    """Padded around by columns, by zeros in rows; made smaller with a filter, larger by a factor that is none of
    sizes, and pooled to parts that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3) for a, b in ((4, 16), (16, 16), (16, 16), (16, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape[-2:]
        for number, conv in enumerate(self.convs):
            x = conv(F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)))
            if number == 0:
                x = F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=False)
            if number == 1:
                x = F.interpolate(x, size=(rows, columns), mode="bilinear", antialias=True)
            if number == 2:
                x = F.adaptive_avg_pool2d(x, (rows - 2, columns - 3))
        return x


class Overlaps(nn.Module):
    """Windows that overlap are taken apart, each changed alone, and added up again; others are side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.patch = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Linear(128, 128),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        windows = F.unfold(x, 4, padding=2, stride=2).transpose(1, 2)
        return self.last(F.fold(self.patch(windows).transpose(1, 2), x.shape[-2:], 4, padding=2, stride=2))


class Attending(nn.Module):
    """Channels weighed by the mean and the largest of each; statistics of another image put in place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.weigh = convs(4, 16, 16, 3), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        x, style = self.convs[0](x), self.convs[0](style)
        pooled = F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.weigh(pooled.flatten(1)))[:, :, None, None]
        own, other = (torch.var_mean(y, dim=(2, 3), keepdim=True) for y in (x, style))
        x = (x - own[1]) / (own[0] + 1e-5).sqrt() * style.std((2, 3), keepdim=True) + other[1]
        return self.convs[2](F.interpolate(F.relu(self.convs[1](x)), scale_factor=2, mode="nearest-exact"))


class Codec(nn.Module):
    """Causal: padded in front only, and what transposed convolutions make too much is cut off behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv1d(16, 24, 7), nn.ConvTranspose1d(24, 12, 10, 5)
        self.block, self.last = nn.Conv1d(12, 12, 3), nn.Conv1d(12, 1, 7)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.up(F.elu(self.first(F.pad(z, (6, 0)))))[..., :-5]
        x = x + self.block(F.pad(F.elu(x), (2, 0)))
        return self.last(F.pad(F.elu(x), (6, 0)))


class Vocoder(nn.Module):
    """Frames become sound by an inverse short-time transform, and sound frames before."""

    def __init__(self, size: int = 32, hop: int = 8) -> None:
        super().__init__()
        self.size, self.hop = size, hop
        self.first, self.last = nn.Conv1d(size // 2 + 1, 24, 7, padding=3), nn.Conv1d(24, size + 2, 7, padding=3)
        self.register_buffer("window", torch.hann_window(size))

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(sound, self.size, self.hop, window=self.window, return_complex=True)
        x = self.last(F.gelu(self.first(spectrum.abs().clamp_min(1e-5).log())))
        size, phase = x.chunk(2, 1)
        return torch.istft(torch.polar(size.clip(max=2.0).exp(), phase), self.size, self.hop, window=self.window)


class Sparse(nn.Module):
    """Transposed convolutions whose windows leave gaps, in three dims, and channels that are shuffled; norms by running
    statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 3, 3, padding=1)
        self.up = nn.ConvTranspose3d(8, 8, (1, 1, 2), (1, 2, 3), output_padding=(0, 1, 0), groups=2)
        self.norm = nn.InstanceNorm3d(8, track_running_stats=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.norm(F.channel_shuffle(self.up(self.first(x)), 2))))


class Smooth(nn.Module):
    """Resized smoothly and normed at once; what ranks make then overlaps, and counts once in norms, means and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.norm = convs(4, 16, 16, 3), nn.GroupNorm(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(F.interpolate(self.convs[0](x), scale_factor=2, mode="bilinear"))
        x = F.interpolate(self.convs[1](F.silu(x)), scale_factor=1.5, mode="bicubic")
        x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True) + 0.01 * x.cumsum(2)
        return self.convs[2](x / x.norm(dim=(2, 3), keepdim=True))


class LinearAttending(nn.Module):
    """Keys of a linear attention are shares of all pixels, and what it gives is scaled by the largest of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.project = (
            nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in ((4, 16, 3), (16, 3, 3), (16, 48, 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        q, k, v = self.project(x).flatten(2).chunk(3, 1)
        context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
        attended = torch.einsum("bde,bdn->ben", context, q.softmax(1)).view(x.shape)
        x = x + attended / attended.max() - attended.logsumexp((2, 3), keepdim=True)
        return self.last(x / x.flatten(2).max(-1)[0][..., None, None])


class Quantising(nn.Module):
    """The nearest of a table for each pixel, with the losses that come with it; pooled by windows that reach over the
    end, in attention that weighs values from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.table = (
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Conv2d(8, 3, 3, padding=1),
            nn.Embedding(32, 8),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = F.avg_pool2d(self.first(x), 2, ceil_mode=True)
        tokens = x.flatten(2).transpose(1, 2)
        places = torch.cdist(tokens, self.table.weight[None]).argmin(-1)
        nearest = self.table(places).transpose(1, 2)
        loss = F.mse_loss(nearest, tokens.transpose(1, 2)) + F.smooth_l1_loss(nearest, tokens.transpose(1, 2))
        weights = torch.bmm(tokens, nearest).softmax(2)
        attended = torch.bmm(nearest, weights.permute(0, 2, 1)).view(x.shape)
        variation = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
        return self.last(x + attended), loss + variation, places


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "texture": (Texture, ((1, 4, 13, 12),)),
    "panorama": (Panorama, ((1, 4, 13, 26),)),
    "overlaps": (Overlaps, ((1, 4, 26, 24),)),
    "attending": (Attending, ((1, 4, 25, 24), (1, 4, 25, 24))),
    "codec": (Codec, ((1, 16, 61),)),
    "vocoder": (Vocoder, ((1, 1003),)),
    "sparse": (Sparse, ((1, 4, 3, 13, 12),)),
    "smooth": (Smooth, ((1, 4, 13, 12),)),
    "linear-attending": (LinearAttending, ((1, 4, 24, 25),)),
    "quantising": (Quantising, ((1, 4, 50, 37),)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_and_shared_and_gathers_nothing(name: str, pytestconfig: pytest.Config) -> None:
    make, shapes = CASES[name]
    torch.manual_seed(0)
    module, example = make().eval(), tuple(map(torch.randn, shapes))
    traced = xir.trace(module, example)
    chosen = DEGREES if pytestconfig.getoption("--zoo-all") else [DEGREES[[*CASES].index(name) % len(DEGREES)]]
    for degrees in chosen:
        parallel = traced.parallelize(**degrees, **({"machine": SLOW} if "ring" in degrees else {}))  # type: ignore[arg-type]
        result, report = check_parallel(parallel, module, example), parallel.report()
        assert result.ok, f"{degrees}: {result}"
        assert not report.fallbacks, report
        assert report.share <= SHARES[len(report.flops_per_rank)], report


def test_a_scale_that_is_not_the_ratio_of_sizes_is_not_taken_for_one() -> None:
    """Nine rows and eight columns become 27 and 24, but by 3.1: what each rank repeats three times would be wrong."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=3.1), nn.Conv2d(4, 3, 3, padding=1))
    example = (torch.randn(1, 3, 9, 8),)
    assert module[1](example[0]).shape[-1] == 3 * 8  # three times as long, by 3.1
    parallel = xir.trace(module, example).parallelize(ulysses=2)
    assert not parallel.report().fallbacks
    assert check_parallel(parallel, module, example).ok


def test_what_is_sampled_anywhere_is_gathered_by_name() -> None:
    class Warp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.flow = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return F.grid_sample(y, self.flow(y).permute(0, 2, 3, 1).tanh(), align_corners=False)

    module, example = Warp(), (torch.randn(1, 4, 13, 12),)
    parallel = xir.trace(module, example).parallelize(ulysses=2)
    assert check_parallel(parallel, module, example).ok
    [fallback] = parallel.report().fallbacks
    assert "any place" in fallback.reason and fallback.bytes


def test_windows_that_leave_samples_without_a_value_are_refused_as_by_torch() -> None:
    module, example = Vocoder(), (torch.randn(1, 1003),)
    with torch.no_grad():
        traced = xir.trace(module, example)
        module.window.zero_()
        with pytest.raises(Exception, match="without a value"):
            traced.parallelize(ulysses=2).simulate(module, example)

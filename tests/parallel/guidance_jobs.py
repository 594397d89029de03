"""Guidance by any number of branches: a loop of denoising steps as pipelines have it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jobs import Degrees, _rank, relative_error
from torch import nn

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.runtime.runner import Runner


@torch.no_grad()
def _denoised(model: Any, steps: Sequence[Sequence[int]], reads: int | None = None) -> torch.Tensor:
    """The latents after steps that each make calls of so many samples, and guide by all of these; what the call of
    number `reads` gives is read at once."""
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    for number, calls in enumerate(steps):
        found, label = [], 0
        for samples in calls:
            y = torch.arange(label, label + samples)
            label += samples
            t = torch.full((samples,), 900.0 - 100 * number)
            found.append(model(x=x.expand(samples, -1, -1, -1), t=t, y=y))
            if len(found) == reads:
                found[-1].mean().item()
        weights = torch.linspace(1, 2, label)
        x = x + 0.1 * sum(w * one for w, one in zip(weights, torch.cat(found)[:, :4].split(1), strict=True))
    return x + 0


def branches(degrees: Degrees, steps: list[list[int]], reads: int | None = None) -> dict[str, Any]:
    """A run of which each step has other branches; how many forwards this rank computed, and what
    it was told. `reads`: by rank 0 only."""
    torch.set_num_threads(1)
    model, _ = models.load("plain-dit:tiny")
    want = _denoised(model, steps)
    runs: list[int] = []
    compute = Runner.compute
    Runner.compute = lambda *args: runs.append(1) or compute(*args)  # type: ignore[method-assign, func-returns-value]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            port = xir.port(model, **degrees)
            got = _denoised(port, steps, None if _rank() else reads)
    finally:
        Runner.compute = compute  # type: ignore[method-assign]
    told = [str(one.message) for one in caught if "cfg=" in str(one.message)]
    return {"error": relative_error(got, want), "runs": len(runs), "told": told, "programs": len(port.programs)}


class _SkipLayer(nn.Module):
    """A model that some calls leave a layer out of, as skip-layer guidance does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.factor = torch.ones(1)

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, skip: tuple[int, ...] = ()
    ) -> torch.Tensor:
        x = torch.cat([text, hidden_states + timestep[:, None, None]], 1)
        for place, layer in enumerate(self.layers):
            if place not in skip:
                x = layer(x)
        return x[:, text.shape[1] :] * self.factor


@torch.no_grad()
def skipped_layers(degrees: Degrees, joined: bool) -> dict[str, Any]:
    """Three branches: the prompt, a shorter negative one, and the prompt with a layer left out, in the middle of a run
    only. `joined`: the first two are one batch."""
    torch.set_num_threads(1)
    model = _SkipLayer().eval()
    port = xir.port(model, **degrees)
    draw = torch.Generator().manual_seed(1)
    prompt, negative = torch.randn(1, 7, 16, generator=draw), torch.randn(1, 7 if joined else 4, 16, generator=draw)
    both = torch.cat([prompt, negative]) if joined else None

    def run(called: Any) -> torch.Tensor:
        x = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(2))
        for step in range(5):
            t = torch.tensor([5.0 - step])
            if both is not None:
                with_prompt, without = called(x.expand(2, -1, -1), both, t.expand(2)).chunk(2)
            else:
                with_prompt, without = called(x, prompt, t), called(x, negative, t)
            guided = without + 3 * (with_prompt - without)
            if 1 <= step < 4:
                guided = guided + (with_prompt - called(x, prompt, t, skip=(1,)))
            x = x - 0.1 * guided
        return x + 0

    return {"error": relative_error(run(port), run(model)), "programs": len(port.programs)}


class _Noisy(_SkipLayer):
    """A model that draws noise of its own; in a leaf, as what it does depends on values, or not."""

    def __init__(self, leaf: bool) -> None:
        super().__init__()
        self.noise = _Noise(leaf)

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return super().forward(self.noise(hidden_states), text, timestep)


class _Noise(nn.Module):
    def __init__(self, leaf: bool) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.leaf and x.abs().max() > 100:
            return x
        return x + 0.1 * torch.randn_like(x.mT).mT


@torch.no_grad()
def noisy(degrees: Degrees, leaf: bool) -> dict[str, Any]:
    """Two calls a step of a model that draws noise, and what is drawn afterwards."""
    torch.set_num_threads(1)
    model = _Noisy(leaf).eval()
    port = xir.port(model, **degrees)

    def run(called: Any) -> torch.Tensor:
        torch.manual_seed(3)
        x, prompt, negative = torch.randn(1, 24, 16), torch.randn(1, 7, 16), torch.randn(1, 4, 16)
        for step in range(3):
            t = torch.tensor([3.0 - step])
            with_prompt, without = called(x, prompt, t), called(x, negative, t)
            x = x - 0.1 * (without + 3 * (with_prompt - without)) + 0.1 * torch.randn_like(x)
        return x + 0

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = relative_error(run(port), run(model))
    return {"error": error, "told": any("draws random numbers" in str(one.message) for one in caught)}


class _Returns(_SkipLayer):
    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor) -> Any:
        return super().forward(hidden_states, text, timestep), hidden_states


@torch.no_grad()
def inputs_given_back(degrees: Degrees) -> list[bool]:
    """Whether the result of a call, or of one that waits for another, that is an input is that tensor."""
    torch.set_num_threads(1)
    port, x, text, t = (
        xir.port(_Returns().eval(), **degrees),
        torch.randn(1, 24, 16),
        torch.randn(1, 7, 16),
        torch.ones(1),
    )
    return [port(x, text, t)[1] is x for _ in range(4)]


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda model: next(model.parameters()).mul_(2),
    "other memory": lambda model: setattr(next(model.parameters()), "data", next(model.parameters()) * 2),
    "through data": lambda model: next(model.parameters()).data.mul_(2),
    "through NumPy": lambda model: next(model.parameters()).detach().numpy().__imul__(2),
    "an attribute": lambda model: model.factor.mul_(2),
    "loaded": lambda model: model.load_state_dict({k: 2 * x for k, x in model.state_dict().items()}),
    "cast": lambda model: model.double(),
}


@torch.no_grad()
def written_while_waiting(degrees: Degrees) -> dict[str, list[Any]]:
    """By how weights change while a call waits for another: its error, or why there is no result; and that of the
    next call."""
    torch.set_num_threads(1)
    found: dict[str, list[Any]] = {}
    torch.manual_seed(0)
    x, text, t = torch.randn(1, 24, 16), torch.randn(1, 7, 16), torch.ones(1)
    for name, write in WRITES.items():
        model = _SkipLayer().eval()
        port, want = xir.port(model, **degrees), model(x, text, t)
        waiting = port(x, text, t)
        write(port)
        try:
            got: Any = relative_error(waiting + 0, want)
        except xir.MismatchError as error:
            got = str(error)
        given = [one.to(next(model.parameters()).dtype) for one in (x, text, t)]
        found[name] = [got, relative_error(port(*given) + 0, model(*given))]
    return found


@torch.no_grad()
def stages_across_a_layer() -> dict[str, float]:
    """The prologue is so long that stages meet inside of the first of two layers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    model, x = nn.Sequential(nn.Linear(16, 16), encoder, nn.Linear(16, 16)).eval(), torch.randn(2, 12, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"error": relative_error(xir.port(model, pipefusion=2)(x) + 0, model(x))}

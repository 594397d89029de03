"""Ways to run an emitted module: what cannot be is refused, what can be computes the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xdit_ir as xir


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.up, self.down = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x), approximate="tanh"))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(16) for _ in range(3)))


EXAMPLE = (torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"cuda_graph": True},
            "needs a model on a CUDA device, this one is on cpu; nearest legal: compile=True",
        ),
        ({"transport": "pear"}, "transport='pear'; there are auto, collective, packed, peer; did you mean 'peer'"),
        ({"attention": "cudn"}, "attention='cudn'; there are auto, .*; did you mean 'cudnn'"),
        ({"timeout": "5"}, "timeout='5': expected a positive number of seconds, or None"),
        ({"handshake": "no"}, "handshake='no': expected True or False"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], says: str, model: nn.Sequential) -> None:
    parallel = xir.trace(model, EXAMPLE).parallelize()
    with pytest.raises(xir.XditError, match=says):
        parallel.emit(model, **options)  # type: ignore[arg-type]
    with pytest.raises(xir.XditError, match=says):
        xir.port(model, **options)(*EXAMPLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"transport": "pear"}, {"attention": "cudn"}, {"timeout": -1.0}])
def test_what_exists_nowhere_is_refused_before_the_first_forward(options: dict[str, object], model: nn.Module) -> None:
    with pytest.raises(xir.ParallelizeError):
        xir.port(model, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stream_weight": "1GiB"}, "stream_weight='1GiB' is no .*option; did you mean stream_weights='1GiB'"),
        ({"warmup": 2}, "warmup=2 is no .*; did you mean warmup_steps=2"),
        ({"ulyses": 2}, "did you mean ulysses=2"),
        ({"warmup_steps": 0}, "warmup_steps=0 is not a positive integer"),
        ({"patches": 4}, "^patches=4 needs pipefusion > 1"),
    ],
)
def test_options_that_do_not_exist_name_the_nearest(options: dict[str, object], says: str, model: nn.Module) -> None:
    with pytest.raises(xir.ParallelizeError, match=says):
        xir.port(model, **options)(*EXAMPLE)  # type: ignore[call-overload]
    with pytest.raises(xir.ParallelizeError, match=says):
        xir.trace(model, EXAMPLE).parallelize(**options)  # type: ignore[arg-type]


def test_one_rank_without_a_process_group_is_the_model(model: nn.Sequential) -> None:
    assert torch.equal(xir.port(model)(*EXAMPLE), model(*EXAMPLE))


def test_parameters_whose_names_are_no_identifiers_or_become_the_same_one() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.a = nn.Linear(4, 4), nn.Module()
            self.a.b_weight, self.a.b_bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(self.a_b(x), self.a.b_weight, self.a.b_bias)

    model, example = Twins(), (torch.randn(2, 4),)
    assert torch.equal(xir.port(model)(*example), model(*example))


def test_compiled_in_the_callers_inference_mode_and_out_of_it(model: nn.Sequential) -> None:
    """Code is made once, whatever mode the caller is in, and results can be used in any."""
    ported = xir.port(model, compile=True)
    with torch.inference_mode():
        inside = ported(EXAMPLE[0].clone())
    outside = ported(*EXAMPLE)
    torch.testing.assert_close(inside.clone(), model(*EXAMPLE))
    assert torch.equal(inside, outside) and not outside.is_inference()
    assert len(ported.programs) == 1
